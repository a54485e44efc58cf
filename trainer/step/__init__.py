"""What a step needs besides the model: its config, recompute, FLOPs, profile, determinism."""
