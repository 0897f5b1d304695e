"""The tables of an evaluation, with the names of what was evaluated."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import pandas as pd

from robusttrain.config.schema import COMPANIONS, NOTHING
from robusttrain.evaluation.findings import Check
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
    files: Sequence[str] | None = None,
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
    files
        The names of all test images, if they are files.
    """
    samples = found.ledger.samples()
    if files is not None:
        samples.insert(1, "file", [files[index] for index in samples["index"]])
    certificates, kept = found.certificates, found.ledger.adversarial is not None
    return Result(
        table=_report_of(found, names, threat, seed),
        samples=samples,
        audit=pd.DataFrame(found.audit.checks, columns=Check._fields),
        curve=pd.DataFrame([point.as_dict() for point in found.audit.curve], columns=CURVE_COLUMNS),
        certified=pd.DataFrame(map(asdict, certificates.images if certificates else ())),
        adversarial=found.ledger.arrays() if kept else None,
        gallery=examples.arrays(found.ledger) if found.ledger.examples else None,
        paper=certificates.theorem.paper if certificates else "",
    )


def _report_of(
    found: EvaluationResult, names: Mapping[str, str], threat: Threat, seed: int
) -> pd.DataFrame:
    report = found.ledger.report(threat, found.rows, found.audit.verdict)
    shown = {TRAIN_ATTACK: UNKNOWN, **names, "defense": combined(names)}
    for position, key in enumerate(("dataset", "model", "defense", TRAIN_ATTACK, "noise")):
        report.insert(position, key, shown[key])
    report.insert(5, "seed", seed)
    return report


def combined(names: Mapping[str, str]) -> str:
    """The name of the defense and of its additions, such as trades+awp+ema."""
    companions = (names.get(group, NOTHING) for group in COMPANIONS)
    return "+".join([names["defense"], *(name for name in companions if name != NOTHING)])
