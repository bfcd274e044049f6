"""From hidden states and logits to a token, on the host."""
