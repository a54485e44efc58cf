"""Which expert lives where: problem, solvers with a proof, placements as data."""
