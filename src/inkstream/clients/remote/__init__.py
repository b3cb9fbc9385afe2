"""Models of others, drawn with over their APIs. `Remote` is the Drawer; each provider's dialect is one module."""
