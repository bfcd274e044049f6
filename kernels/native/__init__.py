"""The native CPU kernels: C++ in `cpp/`, and the modules that call it through ctypes."""
