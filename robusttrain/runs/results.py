"""What a run writes and shows of its evaluation."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robusttrain.config.run_config import Config
from robusttrain.config.schema import COMPANIONS, NOTHING
from robusttrain.evaluation.pipeline import Found
from robusttrain.report.files import write_arrays, write_csv
from robusttrain.report.terminal import Terminal
from robusttrain.run_directory import ADVERSARIAL, AUDIT, CERTIFIED, CURVE, REPORT, SAMPLES


def report_results(
    config: Config, names: Mapping[str, str], results: Found, run_dir: Path, terminal: Terminal
) -> list[dict[str, Any]]:
    """Write and show what an evaluation found; returns the rows of `report.csv`."""
    report = results.ledger.report(config.threat, results.rows)
    shown = {**names, "defense": combined(names)}
    for position, key in enumerate(("dataset", "model", "defense", "noise")):
        report.insert(position, key, shown[key])
    report.insert(4, "seed", config.seed)
    checks = [check._asdict() for check in results.audit.checks]
    if results.certificates:
        certified = [asdict(image) for image in results.certificates.images]
        write_csv(run_dir / CERTIFIED, certified)
    write_csv(run_dir / SAMPLES, results.ledger.samples())
    if config.evaluation.save_adversarial:
        write_arrays(run_dir / ADVERSARIAL, results.ledger.arrays())
    if results.audit.curve:
        write_csv(run_dir / CURVE, [point.as_dict() for point in results.audit.curve])
    if checks:
        write_csv(run_dir / AUDIT, checks)
    write_csv(run_dir / REPORT, report)
    terminal.report(report, f"{shown['defense']}, {names['model']} on {names['dataset']}")
    if results.certificates:
        curve = [point.row for point in results.certificates.audit.curve]
        terminal.certified(curve, results.certificates.theorem.paper)
    if checks:
        terminal.audit(checks)
    return [{str(key): value for key, value in row.items()} for row in report.to_dict("records")]


def combined(names: Mapping[str, str]) -> str:
    """The defense with what it was combined with, such as trades+awp+ema."""
    companions = (names.get(group, NOTHING) for group in COMPANIONS)
    return "+".join([names["defense"], *(name for name in companions if name != NOTHING)])
