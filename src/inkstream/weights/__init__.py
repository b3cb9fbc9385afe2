"""Read and write state dicts: weight files, key tables, the hub. This package does not know the model modules."""
