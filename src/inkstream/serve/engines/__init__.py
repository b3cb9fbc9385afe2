"""The engine's side: its process, the worker in it, the models that it offers, and its speed."""
