"""The backend on ONNX Runtime."""
