"""Rollout engines: one file per inference library, each importing only its own."""
