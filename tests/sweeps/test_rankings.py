"""Rankings, Pareto fronts, curves and grids: numbers of sweeps that are written by hand."""

from itertools import product
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robusttrain.report.compare import Measure
from robusttrain.report.ledger import wilson
from robusttrain.sweeps import axes, ranking, records
from robusttrain.sweeps.accuracies import accuracies
from robusttrain.sweeps.pairs import Comparison, pairwise
from robusttrain.sweeps.ranking import all_pairs, clear_winner, lettered, rankings, standing
from robusttrain.sweeps.settings import Setting, settings
from robusttrain.sweeps.tradeoff import pareto_front, trade_off
from toys import pages
from toys.sweeps import N, Sweep, flags

WORST = ("worst_case",)


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


def found(sweep: Sweep) -> list[Setting]:
    return settings(sweep.folder, records.read_jobs(sweep.folder))


# --- rankings -----------------------------------------------------------------------------------


def test_settings_are_ranked_under_the_same_threat_model_and_data_only(sweep: Sweep) -> None:
    for defense, wrong in (("rt", 50), ("lsa", 20)):
        for eps in (0.1, 0.2):
            worst = flags(wrong + int(100 * eps))
            sweep.add(f"defense={defense}", f"eps={eps}", clean=flags(9), worst=worst, eps=eps)
    sweep.add("defense=mart", "eps=0.1", clean=flags(0), dataset="mnist")
    ranked = rankings(found(sweep))
    assert [(r.threat, r.dataset, [s.words for s in r.settings]) for r in ranked] == [
        ("linf, eps 0.1", "digits", ["defense=lsa eps=0.1", "defense=rt eps=0.1"]),
        ("linf, eps 0.2", "digits", ["defense=lsa eps=0.2", "defense=rt eps=0.2"]),
        ("linf, eps 0.1", "mnist", ["defense=mart eps=0.1"]),
    ]


def test_letters_are_those_of_the_corrected_tests(sweep: Sweep) -> None:
    """80 and 74 errors on different images cannot be told apart, but 20 are fewer."""
    for defense, wrong, start in (("a", 80, 0), ("b", 74, 60), ("c", 20, 60)):
        sweep.add(f"defense={defense}", clean=flags(0), worst=flags(wrong, start))
    (ranked,) = rankings(found(sweep))
    tested = all_pairs([ranked], WORST)
    assert len(tested) == 3
    assert [s.words for s in ranked.settings] == ["defense=c", "defense=b", "defense=a"]
    assert lettered(ranked, tested) == ["a", "b", "b"]
    assert clear_winner(ranked, ranked.measure, tested) is ranked.settings[0]
    assert clear_winner(ranked, Measure("clean"), tested) is None


def test_the_best_is_no_clear_winner_if_one_other_cannot_be_told_apart(sweep: Sweep) -> None:
    for defense, wrong, start in (("a", 80, 0), ("b", 24, 10), ("c", 20, 0)):
        sweep.add(f"defense={defense}", clean=flags(0), worst=flags(wrong, start))
    (ranked,) = rankings(found(sweep))
    assert clear_winner(ranked, ranked.measure, all_pairs([ranked], WORST)) is None


def test_all_pairs_are_tested_unless_there_are_too_many_settings(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ranking.MOST_RANKED == 30
    monkeypatch.setattr(ranking, "MOST_RANKED", 4)
    for width in range(4):
        sweep.add(f"model.width={width}", clean=flags(width))
    assert len(all_pairs(rankings(found(sweep)), ("clean",))) == 6
    sweep.add("model.width=4", clean=flags(4))
    ranked = rankings(found(sweep))
    assert all_pairs(ranked, ("clean",)).empty
    assert set(lettered(ranked[0], all_pairs(ranked, ("clean",)))) == {""}


def test_a_setting_stands_against_its_baseline(sweep: Sweep) -> None:
    for defense, wrong in (("rt", 50), ("better", 10), ("worse", 90), ("alike", 52)):
        sweep.add(f"defense={defense}", clean=flags(0), worst=flags(wrong))
    everything = found(sweep)
    (ranked,) = rankings(everything)
    words = [setting.keys["defense"] for setting in ranked.settings]
    against = standing(ranked, pairwise(everything, Comparison.of("defense=rt", None)))
    assert dict(zip(words, against, strict=True)) == {
        "rt": "", "better": "better", "worse": "worse", "alike": "not told apart",
    }  # fmt: skip


# --- the trade-off ------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_what_remains_from_the_right(points: list[tuple[int, int]]) -> None:
    """From the highest clean accuracy downward, a point is on it if it is above all before it."""
    front, highest = set(), -1
    for point in sorted(points, reverse=True):
        if point[1] > highest:
            front.add(point)
            highest = point[1]
    assert pareto_front(points) == [point in front for point in points]


def test_the_trade_off_has_the_accuracies_and_both_intervals(sweep: Sweep) -> None:
    for seed, wrong in enumerate((10, 20, 30)):
        sweep.add("defense=rt", f"seed={seed}", clean=flags(wrong), worst=flags(2 * wrong))
    sweep.add("defense=lsa", clean=flags(50), worst=flags(60))
    everything = found(sweep)
    (ranked,) = rankings(everything)
    first, second = trade_off(ranked, accuracies(everything)).to_dict("records")
    assert (first["setting"], first["rank"], first["front"]) == ("defense=rt", 1, True)
    assert (first["clean"], first["accuracy"]) == pytest.approx((0.9, 0.8))
    # t with two degrees of freedom, from a printed table: 4.303.
    half = 4.303 * 0.05 / 3**0.5
    seeds = first["clean_seeds_low"], first["clean_seeds_high"]
    assert seeds == pytest.approx((0.9 - half, 1), abs=1e-4)
    assert (first["images_low"], first["images_high"]) == pytest.approx(wilson(160, N))
    assert (second["setting"], second["rank"], second["front"]) == ("defense=lsa", 2, False)
    assert pd.isna(second["seeds_low"])


def test_proofs_by_bounds_and_by_smoothing_are_certified(sweep: Sweep) -> None:
    """Of 200 images; smoothing has proven three of five, one of them below the radius 0.1."""
    bounds, smoothed, other = (
        sweep.add(f"defense={name}", clean=flags(10), worst=flags(40)) for name in "abc"
    )
    report = pd.read_csv(sweep.folder / bounds.folder / "report.csv")
    row = report.iloc[[1]].assign(attack="verified", accuracy=0.7)
    pd.concat([report.iloc[[0]], row, report.iloc[[1]]]).to_csv(
        sweep.folder / bounds.folder / "report.csv", index=False
    )
    for job, norm in ((smoothed, "linf"), (other, "l2")):
        place = sweep.folder / job.folder
        pd.DataFrame({"curve": ["certified"], "norm": [norm]}).to_csv(
            place / "curve.csv", index=False
        )
        pages.certified().to_csv(place / "certified.csv", index=False)
    found_accuracies = accuracies(found(sweep))
    proven = {word: each.get("certified") for word, each in found_accuracies.items()}
    assert proven["defense=a"] is not None
    assert proven["defense=a"].mean == 0.7
    assert proven["defense=b"] is not None
    assert proven["defense=b"].mean == pytest.approx(1 / 5)
    assert proven["defense=c"] is None


# --- numeric keys -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.1", 0.1), ("8/255", 8 / 255), ("1e-3", 1e-3), ("pgd", None), ("nan", None), ("1/0", None),
     ("3/", None), ("", None), ("1e999", None)],
)  # fmt: skip
def test_numbers_are_read_as_the_command_line_has_them(text: str, value: float | None) -> None:
    assert axes.number(text) == value


def test_curves_are_sorted_by_the_number_and_named_by_the_other_keys(sweep: Sweep) -> None:
    for width, defense in product(("16", "8", "128"), ("rt", "lsa")):
        wrong = int(width) + (defense == "lsa")
        sweep.add(f"model.width={width}", f"defense={defense}", clean=flags(wrong))
    everything = found(sweep)
    assert axes.numeric_keys(everything) == ["model.width"]
    table = axes.curves(everything, "model.width", accuracies(everything))
    clean = table[table["measure"] == "clean"]
    assert clean["curve"].tolist() == ["defense=rt"] * 3 + ["defense=lsa"] * 3
    assert clean["x"].tolist() == [8, 16, 128] * 2
    assert clean["accuracy"].tolist() == pytest.approx(
        [1 - wrong / N for wrong in (8, 16, 128, 9, 17, 129)]
    )
    assert set(clean["panel"]) == {""}
    assert set(clean["interval"]) == {"over images"}


def test_more_than_seven_curves_are_in_panels(sweep: Sweep) -> None:
    for width, defense, eps in product((8, 16), "abcdef", ("0.1", "0.2")):
        sweep.add(f"model.width={width}", f"defense={defense}", f"attack.x={eps}a", clean=flags(1))
    table = axes.curves(found(sweep), "model.width", accuracies(found(sweep)))
    assert set(table["panel"]) == {"attack.x=0.1a", "attack.x=0.2a"}
    assert table["curve"].nunique() == 6


def test_a_grid_has_the_mean_of_each_combination(sweep: Sweep) -> None:
    for eps, steps, seed in product(("8/255", "0.1"), (5, 10), (0, 1)):
        wrong = steps * (1 + seed) + (eps == "0.1")
        words = (f"attack.eps={eps}", f"attack.steps={steps}", f"seed={seed}")
        sweep.add(*words, clean=flags(0), worst=flags(wrong))
    (pair, table), *others = axes.grids(found(sweep), accuracies(found(sweep))).items()
    assert (pair, others) == (("attack.eps", "attack.steps"), [])
    worst = table[table["measure"] == "worst case"].set_index(["x", "y"])["accuracy"]
    assert worst.to_dict() == pytest.approx(
        {
            (8 / 255, 5): 1 - 7.5 / N, (8 / 255, 10): 1 - 15 / N,
            (0.1, 5): 1 - 8.5 / N, (0.1, 10): 1 - 16 / N,
        }
    )  # fmt: skip


def test_a_search_is_no_grid(sweep: Sweep) -> None:
    for lr, decay in ((0.1, 0.2), (0.3, 0.4), (0.5, 0.6)):
        sweep.add(f"optimizer.lr={lr}", f"optimizer.weight_decay={decay}", clean=flags(1))
    assert axes.grids(found(sweep), accuracies(found(sweep))) == {}
