"""Accuracies over the numeric keys of a sweep: curves over one key, and grids over two."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from robusttrain.sweeps.accuracies import Accuracies, intervals
from robusttrain.sweeps.settings import Figure, Setting

# More curves in one picture, and more pictures of one kind, cannot be read.
MOST_CURVES, MOST_PANELS = 7, 6


def number(text: str) -> float | None:
    """The number that a value of the command line is, such as 0.1 or 8/255, if it is one."""
    above, slash, below = text.partition("/")
    try:
        value = float(above) / (float(below) if slash else 1)
    except (ValueError, ZeroDivisionError):
        return None
    return value if math.isfinite(value) else None


def numeric_keys(settings: Sequence[Setting]) -> list[str]:
    """The keys that have numbers only, and at least two different ones."""
    keys = dict.fromkeys(key for setting in settings for key in setting.keys)
    values = {key: {setting.keys[key] for setting in _having(settings, key)} for key in keys}
    numbers = {key: {number(text) for text in texts} for key, texts in values.items()}
    return [key for key, found in numbers.items() if None not in found and len(found) > 1]


def curves(settings: Sequence[Setting], key: str, measured: Accuracies) -> pd.DataFrame:
    """Points of curves over a numeric key: a row for each setting that has it, and each accuracy.

    Columns: `panel` and `curve`, which name the other keys; `x`, the value of the key; `measure`;
    `seeds`; `accuracy`, the mean; `low` and `high`, its 95 % interval: over seeds, or over images
    where there is one seed, as `interval` says. Curves are in the order of the settings, each
    sorted by `x`. Empty if there are too many curves to read.
    """
    having = _having(settings, key)
    others = _varying(having, without=(key,))
    panel_keys = _panel_keys(having, others)
    if panel_keys is None:
        return pd.DataFrame()
    curve_keys = [other for other in others if other not in panel_keys]
    rows = [
        {
            "panel": _words(setting, panel_keys),
            "curve": _words(setting, curve_keys),
            "x": number(setting.keys[key]),
            **_point(setting, name, figure),
        }
        for setting in having
        for name, figure in measured[setting.words].items()
    ]
    table = pd.DataFrame(rows)
    order = pd.factorize(table["curve"])[0]
    return table.iloc[np.lexsort((table["x"].to_numpy(), order))].reset_index(drop=True)


def grids(settings: Sequence[Setting], measured: Accuracies) -> dict[tuple[str, str], pd.DataFrame]:
    """Grids over each pair of numeric keys of which settings have most combinations.

    Columns: `panel`, which names the other keys; `x` and `y`, the values of the pair; `measure`;
    `seeds`; `accuracy`. Pairs with too many panels to read are left out.
    """
    found = {}
    for pair in combinations(numeric_keys(settings), 2):
        having = _having(_having(settings, pair[0]), pair[1])
        others = _varying(having, without=pair)
        rows = [
            {
                "panel": _words(setting, others),
                "x": number(setting.keys[pair[0]]),
                "y": number(setting.keys[pair[1]]),
                **_point(setting, name, figure),
            }
            for setting in having
            for name, figure in measured[setting.words].items()
        ]
        table = pd.DataFrame(rows)
        if len(table) and table["panel"].nunique() <= MOST_PANELS and _is_grid(table):
            found[pair] = table
    return found


def _point(setting: Setting, measure: str, figure: Figure) -> dict[str, Any]:
    ends = intervals(figure)
    over = "images" if figure.over_seeds is None else "seeds"
    return {
        "measure": measure,
        "seeds": len(setting.runs),
        "accuracy": figure.mean,
        "low": ends[f"{over}_low"],
        "high": ends[f"{over}_high"],
        "interval": f"over {over}",
    }


def _is_grid(table: pd.DataFrame) -> bool:
    """Whether at least half of all cells are there: a search has a cell of its own for each job."""
    cells = table["x"].nunique() * table["y"].nunique() * table["panel"].nunique()
    return 2 * len(table.drop_duplicates(["panel", "x", "y"])) >= cells


def _panel_keys(settings: Sequence[Setting], others: Sequence[str]) -> list[str] | None:
    """The keys that get panels of their own, so that few enough curves are in each panel.

    None if no choice leaves few enough panels.
    """
    choices = (c for count in range(len(others) + 1) for c in combinations(others, count))
    found = ((_panels(settings, others, chosen), [*chosen]) for chosen in choices)
    fit = [(len(panels), chosen) for panels, chosen in found if _can_be_read(panels)]
    return min(fit, default=(0, None), key=lambda pair: pair[0])[1]


def _panels(
    settings: Sequence[Setting], others: Sequence[str], chosen: Sequence[str]
) -> list[set[str]]:
    """The curves of each panel, if the keys `chosen` of the `others` get panels."""
    rest = [key for key in others if key not in chosen]
    panels: dict[str, set[str]] = {}
    for setting in settings:
        panels.setdefault(_words(setting, chosen), set()).add(_words(setting, rest))
    return [*panels.values()]


def _can_be_read(panels: Sequence[set[str]]) -> bool:
    return len(panels) <= MOST_PANELS and all(len(panel) <= MOST_CURVES for panel in panels)


def _having(settings: Sequence[Setting], key: str) -> list[Setting]:
    return [setting for setting in settings if setting.keys.get(key)]


def _varying(settings: Sequence[Setting], without: Sequence[str]) -> list[str]:
    keys = dict.fromkeys(key for setting in settings for key in setting.keys)
    return [
        key
        for key in keys
        if key not in without and len({setting.keys.get(key, "") for setting in settings}) > 1
    ]


def _words(setting: Setting, keys: Sequence[str]) -> str:
    return " ".join(f"{key}={setting.keys[key]}" for key in keys if setting.keys.get(key))
