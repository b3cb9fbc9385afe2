"""Those who ask an engine or a server for pictures: HTTP, many requests from a manifest, Ray Data."""
