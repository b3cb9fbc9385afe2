"""The queue: jobs and pictures in SQLite, who is next, and what the engine is told."""
