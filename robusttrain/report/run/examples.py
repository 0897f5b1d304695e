"""A few images that show what attacks did; they stay with a run, for its page."""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robusttrain.report.ledger import Examples, Ledger
from robusttrain.threat import Threat

# Groups of images, and how many each of them has.
BROKEN, CONFIDENT, RESISTED = "broken", "confident", "resisted"
GROUPS, EACH = (BROKEN, CONFIDENT, RESISTED), 6

# Pixels that an example has on a side at most; of larger images every second pixel is kept, or
# every third, and so on, since an average over pixels would hide the perturbation.
SIDE = 64

Rows = NDArray[np.int64]


class Seen(NamedTuple):
    """What was found at the worst point of each image: an entry for each image."""

    broken: NDArray[np.bool_]
    prediction: NDArray[np.int64]
    margin: NDArray[np.float64]
    size: NDArray[np.float64]


def threat_shown(ledger: Ledger, threat: Threat) -> Threat:
    """The threat model whose examples are kept: that of the run, or the first of the attacks."""
    assert ledger.adversarial, "attacks return images"
    return threat if threat in ledger.adversarial else next(iter(ledger.adversarial))


def kept(ledger: Ledger, clean: Any, threat: Threat) -> Examples | None:
    """Images that may become examples, while the images of all are still there; None if no attack.

    Parameters
    ----------
    ledger
        What the attacks did, with the `adversarial` images.
    clean
        The images themselves, a tensor (N, C, H, W).
    threat
        The threat model of the run.
    """
    if not ledger.adversarial:
        return None
    shown = threat_shown(ledger, threat)
    # More than are needed: an audit may yet break some that have resisted.
    rows = np.unique(np.concatenate(list(_chosen(ledger, shown, 2 * EACH).values())))
    stride = math.ceil(max(clean.shape[2:]) / SIDE)
    thinned = (slice(None), slice(None), slice(None, None, stride), slice(None, None, stride))
    # Copies: a view would keep all images.
    images = clean[rows][thinned].cpu().numpy().copy()
    return Examples(
        shown, ledger.index[rows], images, ledger.adversarial[shown][rows][thinned].copy()
    )


def arrays(ledger: Ledger) -> dict[str, Any]:
    """`gallery.npz`: an entry for each example, by group, the most telling one first."""
    examples = ledger.examples
    assert examples is not None, "the evaluation keeps them"
    place = {index: row for row, index in enumerate(examples.index.tolist())}
    groups, rows = [], []
    for group, found in _chosen(ledger, examples.threat, 2 * EACH).items():
        here = [row for row in found.tolist() if int(ledger.index[row]) in place][:EACH]
        groups += [group] * len(here)
        rows += here
    images = [place[int(ledger.index[row])] for row in rows]
    clean = (examples.clean[images] * 255).round().astype(np.uint8)
    seen = _seen(ledger, examples.threat)
    return {
        "group": np.array(groups, dtype=np.str_),
        "index": ledger.index[rows],
        "label": ledger.label[rows],
        "clean_prediction": ledger.prediction[rows],
        "clean_margin": ledger.margin[rows],
        "prediction": seen.prediction[rows],
        "margin": seen.margin[rows],
        "size": seen.size[rows],
        "norm": np.array(str(examples.threat.norm)),
        "eps": np.array(examples.threat.eps),
        "clean": clean,
        "perturbation": (examples.adversarial - examples.clean)[images].astype(np.float16),
    }


def _seen(ledger: Ledger, threat: Threat) -> Seen:
    """At what broke each image first, or else where its margin was smallest."""
    first = ledger.broken_by(threat)
    margin, size = ledger.margin.astype(np.float64), np.zeros(len(ledger.label))
    for name, outcome in ledger.within(threat).items():
        ran = np.ones(len(first), bool) if outcome.attacked is None else outcome.attacked
        lower = (first == "") & ran & (outcome.margin < margin)
        taken = (first == name) | lower
        margin[taken], size[taken] = outcome.margin[taken], outcome.size[taken]
    return Seen(first != "", ledger.worst_prediction(threat), margin, size)


def _chosen(ledger: Ledger, threat: Threat, count: int) -> dict[str, Rows]:
    """The images of each group, the most telling one first."""
    seen = _seen(ledger, threat)
    attacked = seen.broken & ~ledger.misclassified
    # Sizes that differ by rounding are the same; among these, the model was surest of the first.
    size = np.array([float(f"{each:.3g}") for each in seen.size])
    return {
        BROKEN: _first(np.lexsort((-ledger.margin, size)), attacked, count),
        CONFIDENT: _first(np.argsort(seen.margin, kind="stable"), seen.broken, count),
        RESISTED: _first(np.argsort(-seen.margin, kind="stable"), ~seen.broken, count),
    }


def _first(order: Rows, among: NDArray[np.bool_], count: int) -> Rows:
    return np.asarray(order[among[order]][:count])
