"""The native CPU kernels: C++ in `cpp/`, and their binding."""
