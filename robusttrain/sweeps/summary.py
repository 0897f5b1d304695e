"""Write `sweep.md`: means over seeds, and tests of which settings of a sweep differ."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from robusttrain.report.compare import suites, titles
from robusttrain.report.files import whole
from robusttrain.report.ledger import WORST_CASE
from robusttrain.report.page import Page
from robusttrain.run_directory import PAIRS, SUMMARY, SWEEP_TABLE
from robusttrain.sweeps import records
from robusttrain.sweeps.pairs import (
    BASELINE,
    COMPARED,
    MOST_SETTINGS,
    Comparison,
    lines,
    pairwise,
    write_pairs,
)
from robusttrain.sweeps.records import FAILED, FINISHED, UNFINISHED, Job
from robusttrain.sweeps.settings import ConfidenceInterval, Setting, settings

# Verdicts of an audit, from best to worst; runs of earlier versions have none.
VERDICTS = ("", "pass", "none", "warn", "fail")
# A plain bar would end the cell of the table.
BAR = r"\|"

ACCURACY = """\
Each line is a setting: the mean over its seeds ± their sample standard deviation, in percent.
*Over seeds* is a 95 % interval (Student's t) for the mean over many seeds, on the same test images.
*Over images* is a 95 % interval (Wilson's score) for the mean over many images, with the same
networks. It counts each image once, however many seeds there are."""

TOO_MANY = f"""\
This sweep has {{}} settings; up to {MOST_SETTINGS} settings, all pairs are compared. Give the same
command again with {BASELINE}=KEY=VALUE to compare each setting with the one that has this value and
is otherwise the same. Finished jobs are not repeated."""

TESTS = f"""\
Pairs that classify every image alike have no line. The difference is that of the means over the
seeds, first minus second, in points. Its 95 % interval is Student's t over seeds or, with one seed,
that of Bonett and Price over images. McNemar's exact test is made for each seed, on the same
images: b is the number of images that only the first network classifies correctly, and c the number
for the second. p is the largest p of all seeds, or 1 if the seeds disagree on the direction. It
therefore tests whether the difference exists for every seed, and no image counts once per seed.
*Holm* is p corrected for all lines of the table. A winner is named only if it is below 0.05. The
test applies to the networks of these seeds; the interval over seeds shows whether others would
differ.

`{PAIRS}` has the same lines. The more lines there are, the smaller p has to be for a
winner. To test fewer pairs, choose them before you see the results: {BASELINE}=KEY=VALUE
compares each setting only with the one that has this value, and {COMPARED}=[{WORST_CASE}]
compares only by the worst case."""


def write_summary(
    sweep_dir: Path,
    jobs: Sequence[Job],
    comparison: Comparison,
    page: Page = Page.none,
    planned: int = 0,
) -> pd.DataFrame:
    """Write `sweep.md`, `sweep_pairs.csv` and, if there is to be a `page`, `sweep.html`.

    `planned` jobs are known. Returns the first table of `sweep.md`, with a line for each setting.
    """
    found = settings(sweep_dir, jobs)
    compared = pairwise(found, comparison)
    write_pairs(sweep_dir, compared)
    keys = {key: "" for setting in found for key in setting.keys}
    overview = pd.DataFrame([keys | _overview(setting) for setting in found]).fillna("")
    parts = ["# Sweep", _counts(jobs)]
    parts += ["## Accuracy", _accuracy(found, overview)]
    parts += ["## Which settings differ", _tests(found, compared, comparison)]
    for status, title in ((FAILED, "Failed"), (UNFINISHED, "Unfinished")):
        cells = [_ended(job, records.varying(jobs)) for job in jobs if job.status == status]
        parts += [f"## {title}", _markdown(pd.DataFrame(cells))] if cells else []
    with whole(sweep_dir / SUMMARY) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n")
    if page == Page.html:
        # Imported here, since a page needs matplotlib, which takes long.
        from robusttrain.sweeps.sweep_page import write_page

        write_page(sweep_dir, jobs, found, compared, comparison, planned)
    return overview


def _counts(jobs: Sequence[Job]) -> str:
    counts = dict.fromkeys((FINISHED, FAILED, UNFINISHED), 0)
    for job in jobs:
        counts[job.status] += 1
    shares = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    noun = "job" if len(jobs) == 1 else "jobs"
    return f"{len(jobs)} {noun}: {shares}. `{SWEEP_TABLE}` has a row for each job and attack."


def _accuracy(found: Sequence[Setting], overview: pd.DataFrame) -> str:
    if overview.empty:
        return "No job has finished an evaluation."
    runs = [run for setting in found for run in setting.runs.values()]
    threats = " or ".join(dict.fromkeys(str(threat) for run in runs for threat in run.threats))
    counts = dict.fromkeys(str(len(run.label)) for run in runs)
    paragraphs = [
        f"Worst case in {threats}, on {' or '.join(counts)} images.",
        _markdown(overview),
        ACCURACY,
    ]
    faced = suites(runs)
    if len(faced) > 1:
        paragraphs.append(f"Warning: the runs faced different attacks: {' or '.join(faced)}.")
    return "\n\n".join(paragraphs)


def _overview(setting: Setting) -> dict[str, str]:
    """The cells of a line of the first table."""
    cells = {**setting.keys, "seeds": str(len(setting.runs))}
    # Settings with different radii share a column if each has a single radius.
    for measure, name in titles(setting.measures).items():
        figure = setting.figure(measure)
        spread = "" if figure.deviation is None else f" ± {100 * figure.deviation:.2f}"
        cells[name] = f"{100 * figure.mean:.2f}{spread}"
        cells[f"{name}, over seeds"] = _percent(figure.over_seeds)
        cells[f"{name}, over images"] = _percent(figure.over_images)
    verdicts = {str(run.quoted.get("audit", "")) for run in setting.runs.values()}
    return cells | {"audit": max(verdicts, key=VERDICTS.index)}


def _percent(interval: ConfidenceInterval | None) -> str:
    return "" if interval is None else f"{100 * interval.low:.2f} to {100 * interval.high:.2f}"


def _tests(found: Sequence[Setting], compared: pd.DataFrame, comparison: Comparison) -> str:
    if comparison.too_many(found):
        return TOO_MANY.format(len(found))
    if compared.empty:
        return _nothing_compared(found, comparison)
    return "\n\n".join([_markdown(lines(compared)), _pairs_of(comparison), TESTS])


def _pairs_of(comparison: Comparison) -> str:
    if not comparison.baseline:
        return "Each line compares two settings that differ in one key."
    baseline = f"which has {comparison.words} and is otherwise the same"
    return f"Each line compares a setting with the baseline, {baseline}."


def _nothing_compared(found: Sequence[Setting], comparison: Comparison) -> str:
    if found and not comparison.baselines(found):
        return f"No setting has {comparison.words}."
    pair = "differ in one key"
    if comparison.baseline:
        pair = f"differ in nothing but the baseline {comparison.words}"
    accuracies = ", ".join(comparison.accuracies)
    return f"No two settings that {pair} were evaluated on the same images, by {accuracies}."


def _ended(job: Job, keys: Sequence[str]) -> dict[str, str]:
    cells = {"job": str(job.number)} | {key: job.settings.get(key, "") for key in keys}
    return cells | ({"error": job.error} if job.error else {})


def _markdown(cells: pd.DataFrame) -> str:
    rows = [list(cells.columns), ["---"] * len(cells.columns), *cells.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(cell.replace('|', BAR) for cell in row)} |" for row in rows)
