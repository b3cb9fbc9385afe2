"""Graders: they recognise a picture's contents from its pixels only and compare them with the prompt's scene."""
