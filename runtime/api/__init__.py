"""What a caller says and gets: requests, their parameters, outputs, how to serve."""
