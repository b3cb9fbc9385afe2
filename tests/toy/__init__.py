"""A model family of toy size, in one folder, as the families of the package are: docs/add-a-model.md shows it."""
