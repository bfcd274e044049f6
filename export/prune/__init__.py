"""Pruning: a smaller ordinary model from a larger one: fewer layers, heads, channels or tokens."""
