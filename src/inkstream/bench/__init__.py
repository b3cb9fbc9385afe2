"""Timed runs, ours beside peers."""
