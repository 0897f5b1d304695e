"""The page of `robusttrain compare`: that of a sweep, with each run as a setting."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from robusttrain.report.compare import Measure, Run, titles
from robusttrain.report.page import document
from robusttrain.report.radii import in_words
from robusttrain.sweeps.page import Content, page
from robusttrain.sweeps.settings import Setting

# What runs are told apart by, besides their directories.
NAMES = ("dataset", "model", "defense", "noise")


def write_page(
    path: Path,
    runs: Sequence[Run],
    measures: Sequence[Measure],
    pairs: pd.DataFrame,
    radii: pd.DataFrame,
) -> None:
    """Write the page of some runs to `path`.

    Parameters
    ----------
    path
        The file.
    runs, measures, pairs
        The runs, what they are compared by, and the tests of `report.compare.compare`.
    radii
        The tests of `report.radii.compared`.
    """
    names = [name for name in NAMES if len({str(run.clean[name]) for run in runs}) > 1]
    settings = [_setting(run, measures, names) for run in runs]
    words = {str(run.folder): each.words for run, each in zip(runs, settings, strict=True)}
    content = Content(
        title=f"Comparison of {len(runs)} runs",
        subtitle=f"robusttrain compare {' '.join(str(run.folder) for run in runs)}",
        settings=settings,
        tested=_as_of_settings(pairs, measures, words),
        compared=pd.DataFrame(),
        baseline="",
        radii=in_words(radii, words),
        notes={},
        counts=f"{len(runs)} runs.",
        command="",
    )
    document.write(path, page(content, path.parent))


def _setting(run: Run, measures: Sequence[Measure], names: Sequence[str]) -> Setting:
    """A run as a setting, with the rows that are compared."""
    # With its slash, a directory such as 3 is no number.
    keys = {"run": f"{run.folder}/"} | {name: str(run.clean[name]) for name in names}
    compared = replace(run, rows={measure: run.rows[measure] for measure in measures})
    return Setting(keys, {str(run.clean["seed"]): compared})


def _as_of_settings(
    pairs: pd.DataFrame, measures: Sequence[Measure], words: dict[str, str]
) -> pd.DataFrame:
    """Tests of runs in the columns of tests of settings."""
    named = {(m.attack, *_threat(m)): title for m, title in titles(measures).items()}
    keys = zip(pairs["measure"], pairs["norm"], pairs["eps"].fillna(-1), strict=True)
    return pairs.assign(
        first=pairs["run_a"].map(words),
        second=pairs["run_b"].map(words),
        winner=pairs["winner"].map(lambda folder: words.get(folder, "")),
        title=[named[key] for key in keys],
        seeds=1,
        b=pairs["b"].astype(str),
        c=pairs["c"].astype(str),
    )


def _threat(measure: Measure) -> tuple[str, float]:
    return (measure.threat.norm, measure.threat.eps) if measure.threat else ("", -1)
