"""Graders: what a picture shows, told from its pixels alone, and how far that is what was asked for."""
