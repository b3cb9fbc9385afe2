"""`python -m inkstream` is the command line: what torchrun starts."""

from inkstream.cli import run

run()
