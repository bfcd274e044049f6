"""The backend on the native kernels, the default."""
