"""The report's arithmetic, against published intervals and by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robusttrain.report.ledger import Ledger, Outcome, joined
from robusttrain.threat import Norm, Threat


def ledger(label: list[int], prediction: list[int], broken: dict[str, list[int]]) -> Ledger:
    count = len(label)
    made = Ledger(
        index=np.arange(count) * 3,
        label=np.array(label),
        prediction=np.array(prediction),
        margin=np.linspace(-1, 1, count),
        seconds=1.5,
    )
    for number, (name, flags) in enumerate(broken.items(), 1):
        made.outcomes[name] = Outcome(
            Threat(Norm.l2, number / 10),
            np.array(flags, dtype=bool),
            np.zeros(count),
            np.ones(count),
            2.0,
            prediction=np.where(flags, np.array(label) + 1, label),
        )
    return made


def standing(right: int, count: int) -> Ledger:
    return ledger([1] * count, [1] * right + [0] * (count - right), {})


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_are_those_of_the_textbook(
    right: int, count: int, low: float, high: float
) -> None:
    row = standing(right, count).report(Threat(Norm.linf, 0)).iloc[0]
    assert row["ci_low"] == pytest.approx(low, abs=5e-5)
    assert row["ci_high"] == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_are_wilsons(case: tuple[int, int]) -> None:
    right, n = case
    p, z = right / n, 1.959963984540054
    centre = p + z * z / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    row = standing(right, n).report(Threat(Norm.linf, 0)).iloc[0]
    assert row["accuracy"] == p
    assert row["ci_low"] == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-9)
    assert row["ci_high"] == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-9)


def test_clean_comes_first_and_worst_case_last() -> None:
    made = ledger(
        [0, 1, 2, 0], [0, 1, 2, 1],
        {"zeta": [0, 1, 0, 1], "alpha": [0, 0, 1, 1]},
    )  # fmt: skip
    report = made.report(Threat(Norm.linf, 0))
    assert list(report["attack"]) == [
        "clean", "zeta", "alpha", "worst_case", "worst_case", "union",
    ]  # fmt: skip
    # The smaller radius has what was found within it, the larger one what either has found.
    assert list(report["accuracy"]) == [0.75, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert list(report["eps"])[:-1] == [0.0, 0.1, 0.2, 0.1, 0.2]
    assert list(report["norm"]) == ["linf", "l2", "l2", "l2", "l2", ""]
    assert list(report["n"]) == [4] * 6
    assert list(report["seconds"]) == [1.5, 2.0, 2.0, 3.5, 5.5, 5.5]
    assert list(report["audit"]) == ["", "", "", "none", "none", "none"]


def test_of_one_threat_model_there_is_no_union() -> None:
    made = ledger([0, 1], [0, 1], {"alpha": [0, 1]})
    report = made.report(Threat(Norm.linf, 0), verdict=lambda threats: f"{len(threats)} said")
    assert list(report["attack"]) == ["clean", "alpha", "worst_case"]
    assert report["audit"].iloc[-1] == "1 said"


def test_a_row_counts_the_images_that_its_attack_was_meant_for() -> None:
    """Those of the probe: what it broke counts in the worst case of all."""
    made = ledger([0, 0, 0, 0], [0, 0, 0, 1], {"alpha": [0, 0, 0, 1]})
    sampled = np.array([False, True, True, False])
    broken = np.array([False, True, False, False])
    made.outcomes["probe"] = Outcome(
        Threat(Norm.l2, 0.1), broken, np.zeros(4), np.ones(4), 9.0, sampled, sampled, 20, 10,
        prediction=np.ones(4, dtype=int),
    )  # fmt: skip
    report = made.report(Threat(Norm.linf, 0)).set_index("attack")
    probe, worst = report.loc["probe"], report.loc["worst_case"]
    assert (probe["n"], probe["accuracy"], probe["forward"], probe["backward"]) == (2, 0.5, 10, 5)
    assert (worst["n"], worst["accuracy"], worst["seconds"]) == (4, 0.5, 3.5)
    assert made.samples()["probe_broken"].isna().tolist() == [True, False, False, True]


def test_without_attacks_the_worst_case_is_clean() -> None:
    report = standing(7, 10).report(Threat(Norm.l1, 0))
    assert list(report["attack"]) == ["clean", "worst_case"]
    assert list(report["accuracy"]) == [0.7, 0.7]
    assert list(report["eps"]) == [0.0, 0.0]


def test_a_misclassified_image_is_broken_in_the_worst_case_whatever_attacks_say() -> None:
    assert ledger([0, 0], [1, 0], {"pgd": [0, 0]}).union.tolist() == [True, False]


def test_a_prediction_of_no_class_is_wrong_for_every_label() -> None:
    assert ledger([0, 1, 2], [-1, -1, -1], {}).misclassified.all()


def test_every_figure_can_be_counted_from_the_samples() -> None:
    made = ledger([0, 1, 2, 0], [0, 1, 2, 1], {"a": [0, 1, 0, 1], "b": [0, 0, 1, 1]})
    rows = made.report(Threat(Norm.l2, 0))
    samples, report = made.samples(), rows.set_index("attack")["accuracy"]
    assert list(samples["index"]) == [0, 3, 6, 9]
    right = samples["clean_prediction"] == samples["label"]
    assert right.mean() == report["clean"]
    for name in ("a", "b"):
        assert 1 - samples[f"{name}_broken"].mean() == report[name]
    every = right & (samples["a_broken"] == 0) & (samples["b_broken"] == 0)
    assert every.mean() == report["union"]
    assert {"clean_margin", "a_margin", "a_size"} <= set(samples.columns)


def test_invalid_images_add_up_over_attacks_and_over_processes() -> None:
    parts = []
    for first, counts in ((0, (1, 2)), (2, (0, 4))):
        part = ledger([0, 0], [0, 0], {"a": [0, 0], "b": [0, 1]})
        part.index = part.index + first
        for name, invalid in zip(part.outcomes, counts, strict=True):
            part.outcomes[name] = replace(part.outcomes[name], invalid=invalid)
        parts.append(part)
    report = joined(parts).report(Threat(Norm.linf, 0))
    assert dict(zip(report["attack"], report["invalid"], strict=True)) == {
        "clean": 0, "a": 1, "b": 6, "worst_case": 7, "union": 7,
    }  # fmt: skip
