"""Benchmarks: timed runs of inkstream and of peers, which are other implementations."""
