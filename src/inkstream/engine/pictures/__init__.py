"""Picture files: what goes into a drawing, what is written beside it, and what other programs wrote."""
