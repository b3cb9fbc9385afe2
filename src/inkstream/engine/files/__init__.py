"""Model files: where they are, their licences, and conversion to other formats and precisions."""
