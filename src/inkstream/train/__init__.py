"""Training: a recipe, deterministic batches, objectives, and one training loop for the parts of every family."""
