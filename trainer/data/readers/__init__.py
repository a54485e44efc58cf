"""Formats of training text, one a file."""
