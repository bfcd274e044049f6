"""Batch jobs: durable queues of requests that a server answers beside its others."""
