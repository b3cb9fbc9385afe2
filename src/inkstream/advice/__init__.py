"""Advice: which model on which card, and what a picture costs on an own card, a rented card and by an API."""
