"""The files of a run directory that several modules know."""

# The command line of the run, and the lock of whoever works there.
COMMAND, LOCK = "command.json", ".lock"

# Written last: a run without it has not come to its end.
MANIFEST = "manifest.json"

# What Hydra and the log write before a run has done anything; alone, it is nothing to keep.
PREAMBLE = {".hydra", COMMAND, "robusttrain.log"}
