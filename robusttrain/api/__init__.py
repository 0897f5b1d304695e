"""The Python API, and what it shares with the command line: a run, from its words to its result."""
