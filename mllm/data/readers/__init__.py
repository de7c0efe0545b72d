"""Provide the readers, each of which reads one file format as items."""
