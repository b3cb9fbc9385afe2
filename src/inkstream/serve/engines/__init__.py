"""The engine for the server: its process, its worker, the offered models and their measured speed."""
