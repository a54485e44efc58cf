"""Rules of a sparsity plan for a tiny model: one of each way to change masks."""

RIGL = {
    "match": ["*.experts.*.gate_proj.weight", "*.experts.*.up_proj.weight"],
    "distribution": {"kind": "erk"},
    "schedule": {"density": 0.3, "every_steps": 2},
    "regrow": {"criterion": "gradient", "window_steps": 2, "stop": 1.0},
}
SR_STE = {
    "match": ["*.experts.*.down_proj.weight"],
    "schedule": {"every_steps": 1},
    "pattern": {"kind": "n_m", "n": 2, "m": 4},
    "flow": {"kind": "ste", "decay": 2e-4},
}
GMP = {
    "match": ["*.q_proj.weight"],
    "schedule": {"kind": "polynomial", "density": 0.2, "every_steps": 2, "stop": 0.75},
}
