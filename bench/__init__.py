"""The benchmark: EDM beside what its users would take otherwise. `python -m bench` runs it."""
