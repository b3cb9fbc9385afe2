"""Picture files: input pictures, the metadata of output pictures, and the metadata of other programs."""
