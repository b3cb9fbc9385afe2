"""The queue: jobs and pictures in SQLite, the order of the jobs, and the messages to and from the engine."""
