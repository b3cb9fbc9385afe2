"""The engine: `submit(Request) -> Iterator[Event]`, and the parts that it uses. No family is named here."""
