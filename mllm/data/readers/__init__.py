"""Readers: a file format to items."""
