"""Write `sweep.html`, which grows while jobs end."""

import logging
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from robusttrain.errors import InputError
from robusttrain.report.files import intact
from robusttrain.report.page import document
from robusttrain.run_directory import SWEEP_CONFIG, SWEEP_PAGE
from robusttrain.sweeps import records
from robusttrain.sweeps.notes import notes
from robusttrain.sweeps.page import Content, page
from robusttrain.sweeps.pairs import Comparison, pairwise
from robusttrain.sweeps.ranking import all_pairs, rankings
from robusttrain.sweeps.records import Job
from robusttrain.sweeps.settings import Setting, settings
from robusttrain.sweeps.trained import SEED

log = logging.getLogger("robusttrain")

# A page of 200 jobs takes seconds. It is not written again within a minute, and not within as many
# more seconds as there are jobs, so that short jobs do not wait for it.
SECONDS, SECONDS_PER_JOB = 60, 1


def grow(sweep_dir: Path, comparison: Comparison, planned: int) -> None:
    """Write the page of a sweep that runs, unless it is too new; `planned` jobs are known.

    A job does not fail for the page: what prevents it is a line in the log.
    """
    jobs = records.read_jobs(sweep_dir)
    path = sweep_dir / SWEEP_PAGE
    age = time.time() - path.stat().st_mtime if path.is_file() else float("inf")
    if age < SECONDS + SECONDS_PER_JOB * len(jobs):
        return
    try:
        found = settings(sweep_dir, jobs)
        write_page(sweep_dir, jobs, found, pairwise(found, comparison), comparison, planned)
    except (InputError, OSError) as error:
        log.warning("%s was not written: %s", path, error)


def rewrite(sweep_dir: Path) -> Path:
    """Write the page of a sweep again, from its records; returns its path."""
    jobs, comparison = records.read_jobs(sweep_dir), Comparison.saved(sweep_dir)
    found = settings(sweep_dir, jobs)
    write_page(sweep_dir, jobs, found, pairwise(found, comparison), comparison)
    return sweep_dir / SWEEP_PAGE


def write_page(
    sweep_dir: Path,
    jobs: Sequence[Job],
    found: Sequence[Setting],
    compared: pd.DataFrame,
    comparison: Comparison,
    planned: int = 0,
) -> None:
    """Write `sweep.html`.

    Parameters
    ----------
    sweep_dir, jobs
        The directory of the sweep, and its jobs.
    found, compared
        Its settings, and the tests that the user has chosen.
    comparison
        What is compared.
    planned
        How many jobs are known.
    """
    keys = [key for key in records.varying(jobs) if key != SEED]
    content = Content(
        title=f"Sweep over {', '.join(keys)}" if keys else "Sweep",
        subtitle=str(sweep_dir),
        settings=found,
        tested=all_pairs(rankings(found), comparison.accuracies),
        compared=compared,
        baseline=comparison.words,
        radii=pd.DataFrame(),
        notes=notes(sweep_dir, jobs),
        counts=f"{records.counted(jobs, planned, records.UNFINISHED)}.",
        command=command(sweep_dir),
    )
    document.write(sweep_dir / SWEEP_PAGE, page(content, sweep_dir))


def command(sweep_dir: Path) -> str:
    """The command of a sweep; empty if it was no grid."""
    path = sweep_dir / SWEEP_CONFIG
    if not path.is_file():
        return ""
    # Imported here, since pages of old sweeps have no command.
    from omegaconf import OmegaConf

    with intact(path):
        overrides = OmegaConf.load(path).hydra.overrides
        chosen = [word for word in overrides.hydra if not word.startswith("hydra.mode=")]
        return shlex.join(["robusttrain", "-m", *overrides.task, *chosen])
