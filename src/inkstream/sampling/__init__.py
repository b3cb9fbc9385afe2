"""Schedules, solvers, guidance and masks: pure functions over tensors."""
