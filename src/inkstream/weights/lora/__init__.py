"""Adapters in files (LoRA and its relatives): what they change, how they are named, how they are read and written."""
