"""What the kernels compute, in plain numpy and torch: tests and benches compare with it."""
