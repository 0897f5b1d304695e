"""The tables of an evaluation, with the names of what was evaluated."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robusttrain.config.schema import COMPANIONS, NOTHING
from robusttrain.data import ImageIndex
from robusttrain.evaluation.findings import CHECK_COLUMNS
from robusttrain.evaluation.pipeline import EvaluationResult
from robusttrain.report.ledger import CURVE_COLUMNS
from robusttrain.report.result import Result
from robusttrain.report.run import examples
from robusttrain.runs.training_attack import TRAIN_ATTACK, UNKNOWN
from robusttrain.threat import Threat


def result_of(
    found: EvaluationResult,
    names: Mapping[str, str],
    threat: Threat,
    seed: int,
    images: ImageIndex,
) -> Result:
    """The tables of an evaluation.

    Parameters
    ----------
    found
        What the evaluation found.
    names
        The chosen option of each group, and the training attack.
    threat, seed
        Threat model and seed of the run.
    images
        How all test images are found again.
    """
    certificates, kept = found.certificates, found.ledger.adversarial is not None
    certified = pd.DataFrame(map(asdict, certificates.images if certificates else ()))
    return Result(
        table=_report_of(found, names, threat, seed),
        samples=_as_published(found.ledger.samples(), images),
        audit=pd.DataFrame(
            [check.as_dict() for check in found.audit.checks], columns=CHECK_COLUMNS
        ),
        curve=pd.DataFrame([point.as_dict() for point in found.audit.curve], columns=CURVE_COLUMNS),
        certified=_as_published(certified, images) if certificates else certified,
        adversarial=_arrays(found.ledger.arrays(), images) if kept else None,
        gallery=_arrays(examples.arrays(found.ledger), images) if found.ledger.examples else None,
        paper=certificates.theorem.paper if certificates else "",
    )


def _as_published(table: pd.DataFrame, images: ImageIndex) -> pd.DataFrame:
    """`table`, whose `index` has rows of the test set, with their places instead."""
    places = pd.DataFrame(_places(table["index"].to_numpy(), images))
    return pd.concat([places, table.drop(columns="index")], axis=1)


def _arrays(arrays: Mapping[str, Any], images: ImageIndex) -> dict[str, Any]:
    """`arrays`, whose `index` has rows of the test set, with their places instead."""
    places = _places(arrays["index"], images)
    return {**arrays} | {name: np.array(values) for name, values in places.items()}


def _places(rows: NDArray[np.int64], images: ImageIndex) -> dict[str, Any]:
    """The columns that say where the images at `rows` of a test set are found."""
    positions = images.positions.numpy()[rows]
    places: dict[str, Any] = {"index": positions, "index_in": [images.counted_in] * len(rows)}
    if images.files is not None:
        places["file"] = [images.files[row] for row in rows]
    return places


def _report_of(
    found: EvaluationResult, names: Mapping[str, str], threat: Threat, seed: int
) -> pd.DataFrame:
    report = found.ledger.report(threat, found.rows, found.audit.verdict, found.threats)
    shown = {TRAIN_ATTACK: UNKNOWN, **names, "defense": combined(names)}
    for position, key in enumerate(("dataset", "model", "defense", TRAIN_ATTACK, "noise")):
        report.insert(position, key, shown[key])
    report.insert(5, "seed", seed)
    return report


def combined(names: Mapping[str, str]) -> str:
    """The name of the defense and of its additions, such as trades+awp+ema."""
    companions = (names.get(group, NOTHING) for group in COMPANIONS)
    return "+".join([names["defense"], *(name for name in companions if name != NOTHING)])
