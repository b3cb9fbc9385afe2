"""Bytes <-> state dicts: files, key tables, the hub. Nothing here knows a module."""
