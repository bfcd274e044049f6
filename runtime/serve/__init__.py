"""Servers around one engine."""
