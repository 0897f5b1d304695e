"""`robusttrain compare`. It imports neither Hydra nor torch, so that it starts fast."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from robusttrain.errors import InputError
from robusttrain.report import compare as comparison
from robusttrain.report import radii as radii_of_pairs
from robusttrain.report.compare import Measure, Run
from robusttrain.report.files import write_csv
from robusttrain.report.ledger import CLEAN
from robusttrain.report.terminal import Terminal
from robusttrain.run_directory import OF_SWEEP

DESCRIPTION = """\
Compare finished runs sample by sample, and report which of them differ. The
first table ranks the runs. The second compares their clean accuracies, and the
third their worst cases over all attacks. Each row of these two is a pair of
runs: the difference of the accuracies with its 95 % interval (Wald's, adjusted
by Bonett and Price), McNemar's exact test, and its p after Holm's correction
for all tests made. A winner is named only where the corrected p is below 0.05.

Runs with radii in the same norm (evaluation=radii) have a further table: the
median radii, and Wilcoxon's signed-rank test on the images of both. --clean
leaves it out.

All runs must have been evaluated on the same data. Their norm and eps must be
the same, too, unless --clean is given."""

EXAMPLES = """\
examples:
  robusttrain compare outputs/2026-01-31/12-00-00-000000 outputs/2026-02-01/*
  robusttrain compare outputs/sweeps/*/*/* --csv pairs.csv --html page.html"""

USAGE = """\
robusttrain compare RUN RUN ... [--clean] [--csv FILE]
                           [--radii-csv FILE] [--html FILE]"""

LEGEND = (
    "difference: first run minus second, on the n samples that both have",
    "b: samples that only the first run classifies correctly; c: only the second",
    "p: McNemar's exact test; Holm: p corrected for all tests made here",
)


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see robusttrain compare --help)")


def compare(arguments: Sequence[str]) -> None:
    """Run `robusttrain compare`; exit with code 1 and a one-line message on invalid input."""
    try:
        _compare(arguments)
    except InputError as error:
        sys.exit(f"robusttrain: {error}")


def _compare(arguments: Sequence[str]) -> None:
    chosen = _parser().parse_intermixed_args(arguments)
    runs = comparison.read_runs([folder for folder in chosen.run if not _beside_jobs(folder)])
    measures = (Measure(CLEAN),) if chosen.clean else comparison.shared_measures(runs)
    runs = comparison.ranked(runs, measures[-1])
    pairs = comparison.compare(runs, measures)
    radii = pd.DataFrame() if chosen.clean else radii_of_pairs.compared(runs)
    if chosen.radii_csv is not None:
        _refuse_without_radii(chosen.radii_csv, radii)
        _write("--radii-csv", chosen.radii_csv, radii)
    if chosen.csv is not None:
        _write("--csv", chosen.csv, pairs)
    if chosen.html is not None:
        _write_page(chosen.html, runs, measures, pairs, radii)
    terminal = Terminal()
    numbers = {str(run.folder): str(number) for number, run in enumerate(runs, 1)}
    _show(runs, pairs, measures, numbers, terminal)
    if not radii.empty:
        _show_radii(radii, numbers, terminal)


def _parser() -> ArgumentParser:
    parser = _Parser(
        "robusttrain compare",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="*", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--clean", action="store_true", help="compare clean accuracies only")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="also write a row for each pair and accuracy"
    )
    parser.add_argument(
        "--radii-csv", type=Path, metavar="FILE", help="also write a row for each pair of radii"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="also write a page with figures and tests"
    )
    return parser


def _beside_jobs(path: Path) -> bool:
    """Whether `path` is no job but another file of a sweep, which a wildcard also matches."""
    by_hydra = path.suffix == ".yaml" and path.is_file()
    return by_hydra or (path.name in OF_SWEEP and path.exists())


def _refuse_without_radii(path: Path, radii: pd.DataFrame) -> None:
    if radii.empty:
        raise InputError(
            f"--radii-csv {path}",
            allowed="compare runs with radii in the same norm on the same images "
            "(evaluation=radii), without --clean",
            problem="would be empty",
        )


def _write(option: str, path: Path, table: pd.DataFrame) -> None:
    try:
        write_csv(path, table)
    except OSError as error:
        reason = str(error.strerror or error)
        raise InputError(f"{option} {path}", allowed=reason, problem="cannot be written") from error


def _write_page(
    path: Path,
    runs: Sequence[Run],
    measures: Sequence[Measure],
    pairs: pd.DataFrame,
    radii: pd.DataFrame,
) -> None:
    # Imported here, since a page needs matplotlib, which takes long.
    from robusttrain.sweeps.comparison_page import write_page

    try:
        write_page(path, runs, measures, pairs, radii)
    except OSError as error:
        reason = str(error.strerror or error)
        raise InputError(f"--html {path}", allowed=reason, problem="cannot be written") from error


def _show(
    runs: Sequence[Run],
    pairs: pd.DataFrame,
    measures: Sequence[Measure],
    numbers: Mapping[str, str],
    terminal: Terminal,
) -> None:
    titles = comparison.titles(measures)
    (threat,) = {f": worst case in {m.threat}" for m in measures if titles[m] != str(m)} or {""}
    ranking = [{"run": numbers[str(run.folder)]} | _described(run, titles) for run in runs]
    terminal.table(
        pd.DataFrame(ranking), f"{len(runs)} runs{threat}", {"run", "n", *titles.values()}
    )
    for folder, number in numbers.items():
        terminal.say(f"run {number}: {folder}")
    each = len(pairs) // len(measures)
    for place, measure in enumerate(measures):
        rows = pairs.iloc[place * each : (place + 1) * each]
        cells = pd.DataFrame([_tested(row, numbers) for row in rows.to_dict("records")])
        terminal.say("")
        terminal.table(cells, f"{titles[measure]} accuracy", cells.columns)
    for line in LEGEND:
        terminal.say(line)
    suites = comparison.suites(runs)
    if len(measures) > 1 and len(suites) > 1:
        terminal.warn(f"the runs faced different attacks: {' or '.join(suites)}")


def _show_radii(radii: pd.DataFrame, numbers: Mapping[str, str], terminal: Terminal) -> None:
    cells = radii_of_pairs.in_words(radii, numbers)
    terminal.say("")
    terminal.table(cells, "radius of each image", cells.columns)
    for line in radii_of_pairs.LEGEND:
        terminal.say(line)


def _described(run: Run, titles: Mapping[Measure, str]) -> dict[str, str]:
    clean = run.clean
    names = {key: str(clean[key]) for key in ("dataset", "model", "defense", "noise", "seed")}
    accuracies = {title: _accuracy(run.rows[measure]) for measure, title in titles.items()}
    return names | {"n": f"{clean['n']:.0f}"} | accuracies


def _accuracy(row: Mapping[str, Any]) -> str:
    interval = f"{100 * row['ci_low']:.2f}-{100 * row['ci_high']:.2f}"
    doubt = f"\naudit: {row['audit']}" if row.get("audit") in ("warn", "fail") else ""
    return f"{row['accuracy']:.2%}\n{interval}{doubt}"


def _tested(row: Mapping[Hashable, Any], numbers: Mapping[str, str]) -> dict[str, str]:
    return {
        "runs": f"{numbers[row['run_a']]} - {numbers[row['run_b']]}",
        "n": str(row["n"]),
        "difference": f"{row['difference']:+.2%}",
        "95 % interval": f"{100 * row['ci_low']:+.2f} to {100 * row['ci_high']:+.2f}",
        "b": str(row["b"]),
        "c": str(row["c"]),
        "p": comparison.probability(row["p"]),
        "Holm": comparison.probability(row["p_holm"]),
        "winner": numbers.get(row["winner"], ""),
    }
