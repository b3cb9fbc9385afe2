"""Training: a recipe, data as a function of a number, objectives, and one loop that any family's parts go through."""
