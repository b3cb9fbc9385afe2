"""Bake-offs: several models draw the same prompts with the same seeds. They are measured, checked and voted on."""
