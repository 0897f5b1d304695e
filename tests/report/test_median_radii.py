"""Medians of radii, and pairs of runs, against other ways to get them."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import quantile_test

from robusttrain.report.compare import Run
from robusttrain.report.radii import compared, in_words, medians


def table(upper: list[float], norm: str = "linf", largest: float = 1.0) -> pd.DataFrame:
    """`radii.csv`; inf where nothing broke an image."""
    cells = [math.nan if radius == math.inf else radius for radius in upper]
    return pd.DataFrame(
        {"index": range(len(upper)), "norm": norm, "upper": cells, "largest": largest}
    )


def run(name: str, *tables: pd.DataFrame) -> Run:
    radii = pd.concat(tables) if tables else pd.DataFrame()
    return Run(Path(name), {}, (), pd.Series(dtype=int), {}, radii=radii)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_the_interval_of_a_median_is_the_exact_one_of_order_statistics(radii: list[float]) -> None:
    (found,) = medians(table(radii))
    interval = quantile_test(radii, p=0.5).confidence_interval(0.95)
    assert found.median == np.median(radii)
    # Without any sure statement SciPy has NaN or -inf, and no radius is below 0.
    assert found.ci_low == (interval.low if np.isfinite(interval.low) else 0.0)
    assert found.ci_high == (interval.high if np.isfinite(interval.high) else math.inf)


def test_the_interval_holds_the_median_of_the_distribution_in_95_percent() -> None:
    draws, missed = np.random.default_rng(0), 0
    for _ in range(100):
        (found,) = medians(table(draws.exponential(size=40).tolist(), largest=100.0))
        missed += not found.ci_low <= math.log(2) <= found.ci_high
    assert missed <= 0.05 * 100 + 5


def test_a_median_beyond_the_search_is_said_to_be_beyond_it() -> None:
    (found,) = medians(table([0.1, 0.2, *[math.inf] * 8], largest=0.4))
    assert (found.median, found.unbroken) == (math.inf, 8)
    assert found.as_dict()["median"] is None
    assert "median above 0.4" in str(found)
    assert "8 not broken up to 0.4" in str(found)


def test_every_norm_has_its_median() -> None:
    both = pd.concat([table([0.1, 0.2, 0.3]), table([1.0, 2.0, 4.0], "l2", 8.0)])
    assert [(found.norm, found.median) for found in medians(both)] == [("linf", 0.2), ("l2", 2.0)]


def test_p_of_radii_that_are_all_larger_is_that_of_a_fair_coin() -> None:
    radii = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    larger = [radius + 0.01 * number for number, radius in enumerate(radii, 1)]
    row = compared([run("a", table(larger)), run("b", table(radii))]).iloc[0]
    assert row["p"] == pytest.approx(2 / 2**6)
    assert (row["n"], row["larger_a"], row["larger_b"]) == (6, 6, 0)
    assert row["median_a"] == pytest.approx(0.385)
    assert row["median_b"] == pytest.approx(0.35)


def test_radii_beyond_either_search_count_as_the_smaller_largest_one() -> None:
    near, far = table([0.1, math.inf, math.inf], largest=0.4), table([0.1, 0.3, 0.6], largest=0.8)
    row = compared([run("near", near), run("far", far)]).iloc[0]
    assert row["largest"] == 0.4
    assert (row["larger_a"], row["larger_b"]) == (1, 0)
    assert row["median_a"] == 0.4
    assert compared([run("a", far), run("b", far)])["p"].tolist() == [1.0]


def test_only_runs_with_radii_in_the_same_norm_and_images_in_common_are_paired() -> None:
    others = table([0.1]).assign(index=7)
    runs = [run("a", table([0.1, 0.2]), table([0.3, 0.5], "l2")), run("b", table([0.2, 0.2]))]
    runs += [run("none"), run("others", others)]
    assert compared(runs)[["run_a", "run_b", "norm"]].to_numpy().tolist() == [["a", "b", "linf"]]
    assert compared(runs[2:]).empty


def test_a_median_beyond_the_search_is_a_lower_bound_in_words() -> None:
    beyond = table([0.1, math.inf, math.inf], largest=0.25)
    pairs = compared([run("near", table([0.1, 0.125, 0.2])), run("far", beyond)])
    (row,) = in_words(pairs, {"near": "1", "far": "2"}).to_dict("records")
    # One pair is equal, and the other two agree, as two tosses of a coin do with p = 2 / 2**2.
    assert row == {
        "first": "1", "second": "2", "norm": "linf", "n": "3", "medians": "0.125, >= 0.25",
        "larger": "0, 2", "p": "0.5000",
    }  # fmt: skip
    assert in_words(compared([run("a"), run("b")]), {}).empty
