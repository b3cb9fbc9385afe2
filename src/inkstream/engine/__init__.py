"""`submit(Request) -> Iterator[Event]`, and what it stands on. No family is named here."""
