"""HTTP: our own routes and those of other programs' clients."""
