"""The trade-off of clean against robust accuracy, and its Pareto front."""

from collections.abc import Sequence

import pandas as pd

from robusttrain.report.ledger import CLEAN
from robusttrain.sweeps.accuracies import Accuracies, intervals
from robusttrain.sweeps.ranking import Ranking


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other one dominates: at least as good in both, and better in one.

    >>> pareto_front([(0.9, 0.1), (0.8, 0.5), (0.7, 0.5)])
    [True, True, False]
    """
    return [not any(x <= a and y <= b and (x, y) != (a, b) for a, b in points) for x, y in points]


def trade_off(ranking: Ranking, measured: Accuracies) -> pd.DataFrame:
    """A row for each setting of a ranking and each of its robust accuracies.

    Columns: `robust` (`worst case`, `union` or `certified`), `rank`, `setting`, the means `clean`
    and `accuracy` with their 95 % intervals over seeds (`seeds_low`, `seeds_high`; empty with one
    seed) and over images (`images_low`, `images_high`), those of the clean accuracy with the prefix
    `clean_`, and `front`, which is whether the setting is on the Pareto front. Shares from 0 to 1.
    """
    rows = []
    for rank, setting in enumerate(ranking.settings, 1):
        found = dict(measured[setting.words])
        clean = found.pop(CLEAN)
        shared = {"rank": rank, "setting": setting.words, "clean": clean.mean}
        shared |= intervals(clean, "clean_")
        rows += [
            {"robust": name, **shared, "accuracy": figure.mean, **intervals(figure)}
            for name, figure in found.items()
        ]
    table = pd.DataFrame(rows)
    table["front"] = False
    for _, part in table.groupby("robust", sort=False):
        points = [*zip(part["clean"], part["accuracy"], strict=True)]
        table.loc[part.index, "front"] = pareto_front(points)
    return table
