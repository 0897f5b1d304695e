"""How often a test of random events tries: a few times, or often if LONG_TESTS is 1."""

import os


def tries(few: int, many: int) -> int:
    return many if os.environ.get("LONG_TESTS") == "1" else few
