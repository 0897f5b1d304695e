"""Write and print the results of an evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from robusttrain.config.schema import COMPANIONS, NOTHING
from robusttrain.evaluation.pipeline import EvaluationResult
from robusttrain.report.files import write_arrays, write_csv
from robusttrain.report.run import examples
from robusttrain.report.terminal import Terminal
from robusttrain.run_directory import (
    ADVERSARIAL,
    AUDIT,
    CERTIFIED,
    CURVE,
    GALLERY,
    REPORT,
    SAMPLES,
)
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
    found: EvaluationResult, report: pd.DataFrame, files: Sequence[str] | None, run_dir: Path
) -> None:
    """Write the tables of an evaluation, and its attacked images if they were kept.

    `files` are the names of all test images, if they are files.
    """
    if found.certificates:
        certified = [asdict(image) for image in found.certificates.images]
        write_csv(run_dir / CERTIFIED, certified)
    samples = found.ledger.samples()
    if files is not None:
        samples.insert(1, "file", [files[index] for index in samples["index"]])
    write_csv(run_dir / SAMPLES, samples)
    if found.ledger.adversarial is not None:
        write_arrays(run_dir / ADVERSARIAL, found.ledger.arrays())
    if found.ledger.examples is not None:
        write_arrays(run_dir / GALLERY, examples.arrays(found.ledger))
    if found.audit.curve:
        write_csv(run_dir / CURVE, [point.as_dict() for point in found.audit.curve])
    if found.audit.checks:
        write_csv(run_dir / AUDIT, [check._asdict() for check in found.audit.checks])
    write_csv(run_dir / REPORT, report)


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
