"""The server: HTTP, a queue in SQLite, and the engine in a separate process. The server process never imports torch."""
