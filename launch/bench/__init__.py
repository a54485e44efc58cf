"""Benchmarks: `gossamer bench`."""
