"""The settings of a sweep from best to worst, and which of them cannot be told apart."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import pandas as pd

from robusttrain.report.compare import Measure, threats_of
from robusttrain.sweeps.letters import letters
from robusttrain.sweeps.pairs import tests
from robusttrain.sweeps.settings import Figure, Setting
from robusttrain.threat import Threat

# Of more settings, all pairs would be too many tests.
MOST_RANKED = 30


class Ranking(NamedTuple):
    """Settings that faced the same threat models on the same data, the best first.

    Parameters
    ----------
    measure
        What they are ranked by: the worst case, or the union of several.
    threats
        The threat models that they faced.
    dataset
        The data that they were evaluated on.
    settings
        The settings, by their mean over the seeds.
    """

    measure: Measure
    threats: tuple[Threat, ...]
    dataset: str
    settings: tuple[Setting, ...]

    @property
    def threat(self) -> str:
        """The threat models as text."""
        return " and ".join(map(str, self.threats))

    def figure(self, setting: Setting) -> Figure:
        """The accuracy that a setting is ranked by."""
        return setting.figure(self.measure)


def rankings(settings: Sequence[Setting]) -> list[Ranking]:
    """A ranking for each group of settings that can be compared, in the order of the settings."""
    groups: dict[tuple[Any, ...], list[Setting]] = {}
    for setting in settings:
        threats = threats_of(setting.measures)
        (dataset, *_) = {str(run.clean["dataset"]) for run in setting.runs.values()}
        groups.setdefault((setting.measures[-1], threats, dataset), []).append(setting)
    return [
        Ranking(measure, threats, dataset, tuple(_ranked(group, measure)))
        for (measure, threats, dataset), group in groups.items()
    ]


def all_pairs(ranked: Sequence[Ranking], accuracies: Sequence[str]) -> pd.DataFrame:
    """Tests of all pairs of each ranking, as in `pairwise`, with one correction for all of them.

    Of more than `MOST_RANKED` settings no pair is tested.
    """
    few = sum(len(ranking.settings) for ranking in ranked) <= MOST_RANKED
    pairs = [pair for ranking in ranked for pair in combinations(ranking.settings, 2)]
    return tests(pairs if few else [], accuracies)


def lettered(ranking: Ranking, tested: pd.DataFrame) -> list[str]:
    """The letters of the settings of a ranking: those that share one cannot be told apart.

    A pair without a test is not told apart. If `tested` has no pair of the ranking, there are no
    letters.
    """
    places = {setting.words: place for place, setting in enumerate(ranking.settings)}
    rows = _of(tested, ranking, ranking.measure)
    if rows.empty:
        return [""] * len(places)
    won = rows[rows["winner"] != ""]
    pairs = zip(won["first"].map(places), won["second"].map(places), strict=True)
    return letters(len(places), {(min(pair), max(pair)) for pair in pairs})


def clear_winner(ranking: Ranking, measure: Measure, tested: pd.DataFrame) -> Setting | None:
    """The setting that is significantly better than each other one, if there is one."""
    wins = _of(tested, ranking, measure)["winner"]
    for setting in ranking.settings:
        if (wins == setting.words).sum() == len(ranking.settings) - 1 > 0:
            return setting
    return None


def standing(ranking: Ranking, compared: pd.DataFrame) -> list[str]:
    """How each setting of a ranking stands against its baseline, by the tests of `pairwise`.

    `better` and `worse` are significant; empty where a setting has no baseline or is one.
    """
    rows = _of(compared, ranking, ranking.measure)
    winners = dict(zip(rows["first"], rows["winner"], strict=True))
    return [_against(setting.words, winners) for setting in ranking.settings]


def _against(words: str, winners: Mapping[str, str]) -> str:
    if words not in winners:
        return ""
    if not winners[words]:
        return "not told apart"
    return "better" if winners[words] == words else "worse"


def _of(tested: pd.DataFrame, ranking: Ranking, measure: Measure) -> pd.DataFrame:
    """The tests of pairs of a ranking by one measure."""
    words = {setting.words for setting in ranking.settings}
    inside = tested["first"].isin(words) & tested["second"].isin(words)
    threat = measure.threat
    if threat is not None:
        inside &= (tested["norm"] == threat.norm) & (tested["eps"] == threat.eps)
    return tested[inside & (tested["measure"] == measure.attack)]


def _ranked(settings: Sequence[Setting], measure: Measure) -> list[Setting]:
    return sorted(settings, key=lambda setting: -setting.figure(measure).mean)
