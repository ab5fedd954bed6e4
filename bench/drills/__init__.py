"""Drills of ``bench/soak.py``: real runs, real faults, and what must be true afterwards."""
