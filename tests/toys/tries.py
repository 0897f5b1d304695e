"""How often a test of random events tries: a few times, or often if LONG_TESTS is 1."""

import os
from typing import TypeVar

T = TypeVar("T")


def tries(few: T, many: T) -> T:
    return many if os.environ.get("LONG_TESTS") == "1" else few
