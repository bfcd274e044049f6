"""Checkpoints of members: a tail, a low-rank adapter."""
