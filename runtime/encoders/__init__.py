"""Encoders: what is no text becomes rows of embeddings."""
