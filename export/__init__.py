"""Export: a base model and its tails → one quantised bundle with ONNX graphs, and its parity report."""
