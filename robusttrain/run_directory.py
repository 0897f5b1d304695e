"""What lies in the directory of a run or a sweep: the name of every file, once."""

# The command line of the run, and the lock of whoever works there.
COMMAND, LOCK = "command.json", ".lock"

# Written last: a run without it has not come to its end.
MANIFEST = "manifest.json"

LOG = "robusttrain.log"

# What Hydra and the log write before a run has done anything; alone, it is nothing to keep.
PREAMBLE = {".hydra", COMMAND, LOG}

# The weights that a run is remembered by, and the state that an interrupted one resumes from.
BEST, LATEST, PREVIOUS = "best.pt", "checkpoint.pt", "checkpoint.previous.pt"

# Tables: a row for each epoch; attack; test image; point of a curve; check; certified image.
TRAIN, REPORT, SAMPLES = "train.csv", "report.csv", "samples.csv"
CURVE, AUDIT, CERTIFIED = "curve.csv", "audit.csv", "certified.csv"
TABLES = (TRAIN, REPORT, SAMPLES, CURVE, AUDIT, CERTIFIED)

# The attacked images.
ADVERSARIAL = "adversarial.npz"

# Finished pieces of an evaluation under way; each process has a folder of its own.
PIECES = "evaluation.partial"

# A file under this ending is being written.
HALF_WRITTEN = ".partial"

# In the directory of a sweep. The records are hidden as `.hydra` is, so that `*` means the runs
# alone; beside a record lies what its job says where it has no terminal.
RECORDS, SAID = ".jobs", ".said"
SWEEP_TABLE, SUMMARY = "sweep.csv", "sweep.md"
