"""The accuracies of each setting of a sweep: clean, under attack, and certified."""

from collections.abc import Mapping, Sequence

import pandas as pd

from robusttrain.report.compare import Measure, Run, threats_of
from robusttrain.report.files import intact
from robusttrain.report.identity import refuse_mixed
from robusttrain.report.ledger import CLEAN
from robusttrain.run_directory import CERTIFIED, CURVE
from robusttrain.sweeps.settings import Figure, Setting, over_seeds
from robusttrain.threat import Threat

# What is proven, by bounds or by smoothing; the curve of certified radii has the same name.
PROVEN = "certified"

Accuracies = Mapping[str, Mapping[str, Figure]]
"""By the words of each setting: its accuracies, by their names."""


def accuracies(settings: Sequence[Setting]) -> Accuracies:
    """The accuracies of each setting: `clean`; `worst case`, or `union`; `certified` if it is."""
    return {setting.words: _accuracies(setting) for setting in settings}


def robust(measure: Measure) -> str:
    """The name of the accuracy of a measure under attack."""
    return measure.attack.replace("_", " ")


def _accuracies(setting: Setting) -> dict[str, Figure]:
    quoted = setting.measures[-1]
    found = {CLEAN: setting.figure(Measure(CLEAN)), robust(quoted): setting.figure(quoted)}
    proven = certified(setting)
    return found if proven is None else found | {PROVEN: proven}


def certified(setting: Setting) -> Figure | None:
    """The share of images that is proven to stay right within the threat model, over the seeds.

    It is None if there are several threat models, or a run has proven nothing within this one.
    """
    threats = threats_of(setting.measures)
    if len(threats) != 1:
        return None
    proven = [proven_share(run, threats[0]) for run in setting.runs.values()]
    shares = [share for share, _ in filter(None, proven)]
    counts = [n for _, n in filter(None, proven)]
    return over_seeds(shares, counts[0]) if len(shares) == len(proven) else None


def proven_share(run: Run, threat: Threat) -> tuple[float, int] | None:
    """The share of images, and their number, that a run has proven to stay right within `threat`.

    By interval bounds (`evaluation.verify=true`), or by smoothing (`evaluation=certify`).
    """
    for row in run.verified:
        if (row["norm"], row["eps"]) == (threat.norm, threat.eps):
            return float(row["accuracy"]), int(row["n"])
    return _smoothed(run, threat) if (run.folder / CERTIFIED).is_file() else None


def _smoothed(run: Run, threat: Threat) -> tuple[float, int] | None:
    with intact(run.folder):
        refuse_mixed(run.folder, [CURVE, CERTIFIED])
        curve, images = (pd.read_csv(run.folder / name) for name in (CURVE, CERTIFIED))
        if threat.norm not in {*curve.loc[curve["curve"] == PROVEN, "norm"]}:
            return None
        held = ~images["abstained"] & (images["predicted"] == images["label"])
        return float((held & (images["radius"] >= threat.eps)).mean()), len(images)


def intervals(figure: Figure, prefix: str = "") -> dict[str, float]:
    """The ends of both intervals of a figure, by the names of their columns."""
    nothing = (float("nan"), float("nan"))
    ends = zip(("seeds", "images"), (figure.over_seeds or nothing, figure.over_images), strict=True)
    return {
        f"{prefix}{over}_{end}": value
        for over, interval in ends
        for end, value in zip(("low", "high"), interval, strict=True)
    }
