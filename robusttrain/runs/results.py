"""Write and print the results of an evaluation."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robusttrain.config.schema import COMPANIONS, NOTHING
from robusttrain.data import ImageIndex
from robusttrain.evaluation.pipeline import EvaluationResult
from robusttrain.report.files import write_arrays, write_csv
from robusttrain.report.terminal import Terminal
from robusttrain.run_directory import ADVERSARIAL, AUDIT, CERTIFIED, CURVE, REPORT, SAMPLES
from robusttrain.runs.training_attack import TRAIN_ATTACK, UNKNOWN
from robusttrain.threat import Threat


def report_of(
    found: EvaluationResult, names: Mapping[str, str], threat: Threat, seed: int
) -> pd.DataFrame:
    """The table of `report.csv`; `names` are the chosen options of the groups."""
    report = found.ledger.report(threat, found.rows, found.audit.verdict)
    shown = {TRAIN_ATTACK: UNKNOWN, **names, "defense": combined(names)}
    for position, key in enumerate(("dataset", "model", "defense", TRAIN_ATTACK, "noise")):
        report.insert(position, key, shown[key])
    report.insert(5, "seed", seed)
    return report


def write_results(
    found: EvaluationResult, report: pd.DataFrame, images: ImageIndex, run_dir: Path
) -> None:
    """Write the tables of an evaluation, and its attacked images if they were kept.

    `images` says how all test images are found in the data set as published.
    """
    if found.certificates:
        certified = pd.DataFrame([asdict(image) for image in found.certificates.images])
        write_csv(run_dir / CERTIFIED, _as_published(certified, images))
    write_csv(run_dir / SAMPLES, _as_published(found.ledger.samples(), images))
    if found.ledger.adversarial is not None:
        arrays = found.ledger.arrays()
        places = _places(arrays["index"], images)
        write_arrays(run_dir / ADVERSARIAL, arrays | {k: np.array(v) for k, v in places.items()})
    if found.audit.curve:
        write_csv(run_dir / CURVE, [point.as_dict() for point in found.audit.curve])
    if found.audit.checks:
        write_csv(run_dir / AUDIT, [check._asdict() for check in found.audit.checks])
    write_csv(run_dir / REPORT, report)


def _as_published(table: pd.DataFrame, images: ImageIndex) -> pd.DataFrame:
    """`table`, whose `index` has rows of the test set, with their places instead."""
    places = _places(table["index"].to_numpy(), images)
    return pd.concat([pd.DataFrame(places), table.drop(columns="index")], axis=1)


def _places(rows: NDArray[np.int64], images: ImageIndex) -> dict[str, Any]:
    """The columns that say where the images at `rows` of a test set are found."""
    found: dict[str, Any] = {
        "index": images.positions.numpy()[rows],
        "index_in": [images.counted_in] * len(rows),
    }
    return found if images.files is None else found | {"file": [images.files[r] for r in rows]}


def show_results(
    found: EvaluationResult, report: pd.DataFrame, names: Mapping[str, str], terminal: Terminal
) -> None:
    """Print the figures of an evaluation."""
    for name, outcome in found.ledger.outcomes.items():
        if outcome.invalid:
            terminal.warn(
                f"{name} returned {outcome.invalid} invalid images, which count as not "
                f"broken: an attack has to return finite images of the shape and type that it is "
                f"given, in [0, 1] and within {outcome.threat}"
            )
    if found.audit.checks:
        terminal.audit([check._asdict() for check in found.audit.checks], AUDIT)
    if found.certificates:
        curve = [point.row for point in found.certificates.audit.curve]
        terminal.certified(curve, found.certificates.theorem.paper)
    # Last, since it has the figures to quote.
    terminal.report(report, f"{combined(names)}, {names['model']} on {names['dataset']}")


def combined(names: Mapping[str, str]) -> str:
    """The name of the defense and of its additions, such as trades+awp+ema."""
    companions = (names.get(group, NOTHING) for group in COMPANIONS)
    return "+".join([names["defense"], *(name for name in companions if name != NOTHING)])
