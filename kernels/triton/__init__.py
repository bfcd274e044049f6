"""The operations on a GPU, in Triton, one a file. Needs torch and triton."""
