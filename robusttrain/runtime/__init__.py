"""Processes, signals, memory, determinism and progress of a run."""
