"""One training run: methods, loop, trunk cache, privacy, provenance."""
