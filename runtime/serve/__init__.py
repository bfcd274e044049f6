"""Serving one engine: the service, and the doors to it."""
