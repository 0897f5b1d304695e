"""The status of each image that was verified, and how many images have each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robusttrain.threat import Threat

# The statuses of an image.
STATUSES = WRONG, BROKEN, PROVEN, UNDECIDED = "wrong", "broken", "proven", "undecided"

# What proves an image, from the cheapest method on, and the row that counts its proofs.
INTERVALS, LINEAR, BRANCHING = "intervals", "linear bounds", "branching"
ROWS = {INTERVALS: "proven_intervals", LINEAR: "proven_linear", BRANCHING: "proven_branching"}

# Checks of the audit that contradict a proof: the run then exits with 3, whatever is set.
BROKEN_PROOFS = "proven images broken by an attack"
EXCEEDED_BOUNDS = "bounds above the margin of an attacked image"

# The manual cannot spell the type of NumPy that ends in an underscore.
Texts = NDArray[Any]


@dataclass(frozen=True)
class Proofs:
    """What was proven within a threat model, an entry for each image.

    Parameters
    ----------
    threat
        The threat model.
    by
        The method that proved the image, or "".
    seconds
        What all methods took for it.
    because
        Why no method decided it, or "".
    """

    threat: Threat
    by: Texts
    seconds: NDArray[np.float64]
    because: Texts

    @property
    def proven(self) -> NDArray[np.bool_]:
        """Which images have a proof."""
        return np.asarray(self.by != "")

    def status(self, wrong: NDArray[np.bool_], broken: NDArray[np.bool_]) -> Texts:
        """The status of each image; one that is proven and broken is broken."""
        return np.select(
            [wrong, broken, self.proven], [WRONG, BROKEN, PROVEN], default=UNDECIDED
        ).astype(np.str_)

    def columns(self, wrong: NDArray[np.bool_], broken: NDArray[np.bool_]) -> dict[str, Any]:
        """The columns of `samples.csv`."""
        status = self.status(wrong, broken)
        return {
            "status": status,
            "proven": self.proven.astype(int),
            "proven_by": self.by,
            "proof_seconds": np.where(self.proven, self.seconds, np.nan),
            "undecided_because": np.where(status == UNDECIDED, self.because, ""),
        }


def stages(samples: pd.DataFrame) -> Mapping[str, int]:
    """How many images of `samples.csv` have each status, and which method proved how many."""
    status, by = samples["status"], samples["proven_by"]
    proven = {f"proven by {name}": int(((status == PROVEN) & (by == name)).sum()) for name in ROWS}
    wrong, broken, undecided = (int((status == s).sum()) for s in (WRONG, BROKEN, UNDECIDED))
    return {WRONG: wrong, BROKEN: broken, **proven, UNDECIDED: undecided}


def line(samples: pd.DataFrame) -> str:
    """The same in one line, with an eye on the sum."""
    counted = ", ".join(f"{count} {name}" for name, count in stages(samples).items())
    return f"{len(samples)} images: {counted}"
