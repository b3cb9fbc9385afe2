"""Model files: finding and checking them, their licences, and conversion to other formats and precisions."""
