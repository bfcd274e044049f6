"""What runs a batch: native kernels, ONNX Runtime, torch and Triton."""
