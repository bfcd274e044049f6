"""Checkpoints of members: tails and low-rank adapters."""
