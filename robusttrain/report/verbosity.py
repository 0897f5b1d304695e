"""How much a run prints."""

from enum import StrEnum


class Verbosity(StrEnum):
    """How much a run prints."""

    quiet = "quiet"
    normal = "normal"
    verbose = "verbose"
