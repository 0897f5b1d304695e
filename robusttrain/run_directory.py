"""The names of all files in the directory of a run or a sweep."""

# The command line of the run, and the lock of the process that works in the directory.
COMMAND, LOCK = "command.json", ".lock"

# Written last, so that a run without it is unfinished.
MANIFEST = "manifest.json"

# What a run has come to, for programs.
RESULT = "result.json"

LOG = "robusttrain.log"

# Files that exist before a run has done anything; a directory with nothing else is removed.
PREAMBLE = {".hydra", COMMAND, LOG}

# The weights that are evaluated, and the state that an interrupted run resumes from.
BEST, LATEST, PREVIOUS = "best.pt", "checkpoint.pt", "checkpoint.previous.pt"

# Tables, with a row for each epoch; attack; test image; point of a curve; check; certified image;
# test image and norm.
TRAIN, REPORT, SAMPLES = "train.csv", "report.csv", "samples.csv"
CURVE, AUDIT, CERTIFIED, RADII = "curve.csv", "audit.csv", "certified.csv", "radii.csv"
TABLES = (TRAIN, REPORT, SAMPLES, CURVE, AUDIT, CERTIFIED, RADII)

# The adversarial images; and a few of them for the page, with the images that they come from.
ADVERSARIAL, GALLERY = "adversarial.npz", "gallery.npz"

# What a person looks at, made of the other files: the page, and the folder of its figures.
PAGE, PLOTS = "report.html", "plots"

# What a training writes, and what an evaluation writes.
TRAINED = (TRAIN, BEST, LATEST, PREVIOUS)
EVALUATED = (REPORT, SAMPLES, CURVE, AUDIT, CERTIFIED, RADII, ADVERSARIAL, GALLERY)
RESULTS = (*TRAINED, *EVALUATED, RESULT)

# The folder of the logger of that name.
TENSORBOARD = "tensorboard"

# Intermediate results of an unfinished evaluation; each process has its own folder.
EVALUATION_CACHE = "evaluation.partial"

# Suffix of a file that is being written.
TEMPORARY = ".partial"

# In the directory of a sweep: the hidden folder of the jobs' records, so that `*` matches runs
# only, and the suffix of the output that a job without a terminal leaves next to its record.
RECORDS, JOB_OUTPUT = ".jobs", ".said"
SWEEP_TABLE, PAIRS, SUMMARY = "sweep.csv", "sweep_pairs.csv", "sweep.md"
SWEEP_PAGE = "sweep.html"

# The configuration of a sweep, which Hydra's sweeper of grids writes.
SWEEP_CONFIG = "multirun.yaml"

# All files of a sweep but the directories of its jobs.
OF_SWEEP = {RECORDS, SWEEP_TABLE, PAIRS, SUMMARY, SWEEP_PAGE, SWEEP_CONFIG}
