"""Benchmarks: decode, serve, peers; each writes JSON and one self-contained HTML page."""
