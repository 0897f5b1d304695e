"""What distinguishes the trained models that a sweep evaluates again."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

# The key that names a trained model, and that of its seed.
CHECKPOINT, SEED = "checkpoint", "seed"

# A key of a training has this prefix if the evaluation sets the same key.
PREFIX = "train_"


class Evaluated(NamedTuple):
    """A job that evaluates a model: its `checkpoint`, and what describes the training.

    The description has the option of each group and values by their full keys. It is empty if it is
    unknown.
    """

    checkpoint: str
    training: Mapping[str, Any]


def distinguished(
    jobs: Mapping[str, Evaluated], given: Collection[str]
) -> dict[str, dict[str, str]]:
    """The keys, with their values, that differ between the trainings of some jobs.

    A key inside an option is compared only between jobs with the same option, so that
    `defense.beta` is no key of a job with another defense. The training attack is compared between
    jobs with the same defense, which chooses it. Models that are not told apart by their training
    have their `checkpoint` as another key.

    Parameters
    ----------
    jobs
        The jobs, by any names.
    given
        The keys that the command line of the evaluation sets. In the result, such a key of the
        training has the prefix `train_`.
    """
    values: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for job in jobs.values():
        for key, value in job.training.items():
            values[_place(key, job.training)].add(_text(value))
    differing = {place for place, found in values.items() if len(found) > 1}
    cells = {name: _cells(job.training, differing, given) for name, job in jobs.items()}
    checkpoints: dict[frozenset[tuple[str, str]], set[str]] = defaultdict(set)
    for name, job in jobs.items():
        checkpoints[frozenset(cells[name].items())].add(job.checkpoint)
    for name, job in jobs.items():
        if not job.training or len(checkpoints[frozenset(cells[name].items())]) > 1:
            cells[name] = cells[name] | {CHECKPOINT: job.checkpoint}
    return cells


def _cells(
    training: Mapping[str, Any], places: Collection[tuple[str, ...]], given: Collection[str]
) -> dict[str, str]:
    """The values of a training at these places."""
    return {
        f"{PREFIX}{key}" if key in given else key: _text(value)
        for key, value in training.items()
        if _place(key, training) in places
    }


def seed_key(models: Mapping[str, Mapping[str, str]]) -> str:
    """The key of the seeds that a sweep is grouped over: of the trainings, if these differ."""
    trained = {key for model in models.values() for key in model}
    return f"{PREFIX}{SEED}" if f"{PREFIX}{SEED}" in trained else SEED


def _place(key: str, training: Mapping[str, Any]) -> tuple[str, ...]:
    """The key, and the options that it is inside of."""
    part = key.partition(".")[0]
    around = ("defense", part) if part == "attack" else (part,)
    return (key, *(str(training.get(option)) for option in around if option != key))


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
