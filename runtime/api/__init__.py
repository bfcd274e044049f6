"""What a caller sends and receives: requests, their parameters, outputs; and how to serve."""
