"""The operations on a GPU, in Triton, one per file. Needs torch and triton."""
