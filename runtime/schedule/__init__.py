"""Which rows the next step computes, in which KV blocks. It knows nothing of text or tensors."""
