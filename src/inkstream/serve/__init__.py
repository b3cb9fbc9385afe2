"""The server: HTTP in front, a queue in SQLite, the engine in a process of its own. Nothing here imports torch."""
