"""Sweeps that evaluate trained runs again are grouped and compared as sweeps that train."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from robusttrain.runs.inherit import DESCRIBING, INHERITED, NEWER, OF_TRAINING
from robusttrain.sweeps import records
from robusttrain.sweeps.pairs import Comparison
from robusttrain.sweeps.settings import Setting, settings
from robusttrain.sweeps.trained import Evaluated, distinguished
from toys.command_line import CommandLine
from toys.sweeps import Sweep, flags

MADRY = {
    "defense": "madry", "attack": "pgd", "attack.steps": 10, "defense.weight": 1.0, "eps": 0.1,
    "epochs": 20, "seed": 0,
}  # fmt: skip
STANDARD = {key: value for key, value in MADRY.items() if key != "defense.weight"}
STANDARD["defense"] = "standard"


def cells(*trainings: dict[str, Any], given: tuple[str, ...] = ()) -> list[dict[str, str]]:
    """What distinguishes models `a`, `b`, ... with these trainings."""
    jobs = {name: Evaluated(name, one) for name, one in zip("abcdef", trainings, strict=False)}
    return list(distinguished(jobs, given).values())


# --- what distinguishes trainings ----------------------------------------------------------------


def test_only_what_differs_is_a_key() -> None:
    assert cells(STANDARD, MADRY, MADRY | {"seed": 1}) == [
        {"defense": "standard", "seed": "0"},
        {"defense": "madry", "seed": "0"},
        {"defense": "madry", "seed": "1"},
    ]


def test_a_key_of_an_option_is_none_of_another_option() -> None:
    """Otherwise two defenses would never differ in a single key."""
    found = cells(STANDARD, MADRY, MADRY | {"defense.weight": 2.0}, MADRY | {"attack.steps": 3})
    assert found == [
        {"defense": "standard"},
        {"defense": "madry", "attack.steps": "10", "defense.weight": "1"},
        {"defense": "madry", "attack.steps": "10", "defense.weight": "2"},
        {"defense": "madry", "attack.steps": "3", "defense.weight": "1"},
    ]


def test_an_attack_that_the_defense_chooses_is_no_key_of_its_own() -> None:
    fgsm = MADRY | {"defense": "fgsm", "attack": "fgsm"}
    assert cells(MADRY, fgsm) == [{"defense": "madry"}, {"defense": "fgsm"}]
    assert cells(MADRY, MADRY | {"attack": "fgsm"}) == [{"attack": "pgd"}, {"attack": "fgsm"}]


def test_a_key_that_the_evaluation_sets_has_another_name() -> None:
    found = cells(MADRY, MADRY | {"eps": 0.2, "epochs": 5}, given=("checkpoint", "eps"))
    assert found == [
        {"train_eps": "0.1", "epochs": "20"},
        {"train_eps": "0.2", "epochs": "5"},
    ]


def test_models_that_their_training_does_not_tell_apart_keep_their_checkpoints() -> None:
    assert cells(MADRY, MADRY, STANDARD) == [
        {"defense": "madry", "checkpoint": "a"},
        {"defense": "madry", "checkpoint": "b"},
        {"defense": "standard"},
    ]
    assert cells({}, MADRY) == [{"checkpoint": "a"}, {"checkpoint": "b"}]
    assert cells({"defense": "foreign"}, MADRY) == [{"defense": "foreign"}, {"defense": "madry"}]


def test_all_that_describes_a_training_is_looked_at() -> None:
    assert {*DESCRIBING} == {*INHERITED, *NEWER, *OF_TRAINING} - {"data_dir"}


# --- groups and tests ----------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


def found(sweep: Sweep) -> list[Setting]:
    return settings(sweep.folder, records.read_jobs(sweep.folder))


def evaluate(sweep: Sweep, *more: str, radii: tuple[float, ...] = (0.05, 0.1)) -> None:
    """Evaluate two defenses of two seeds again; worse ones at higher seeds and radii."""
    for number, training in enumerate((STANDARD, MADRY)):
        for seed in (0, 1):
            for eps in radii:
                wrong = 20 + 20 * seed + 30 * number
                sweep.add(
                    f"checkpoint=runs/{training['defense']}-{seed}", f"eps={eps}", *more,
                    clean=flags(wrong), worst=flags(wrong + int(400 * eps)), eps=eps,
                    manifest={"trained": training | {"seed": seed}},
                )  # fmt: skip


@pytest.mark.parametrize("more", [(), ("seed=7",)], ids=["inherited", "given"])
def test_settings_are_grouped_over_the_seeds_of_the_trainings(
    sweep: Sweep, more: tuple[str, ...]
) -> None:
    """Even if all are evaluated with the same seed."""
    evaluate(sweep, *more)
    assert [setting.words for setting in found(sweep)] == [
        f"defense={defense} eps={eps}" for defense in ("standard", "madry") for eps in (0.05, 0.1)
    ]
    assert all(list(setting.runs) == ["0", "1"] for setting in found(sweep))
    assert "| standard | 0.05 | 2 |" in sweep.text


def test_defenses_are_compared_at_each_radius(sweep: Sweep) -> None:
    evaluate(sweep)
    table = sweep.compared(Comparison.of("defense=standard", ["worst_case"]))
    assert table["first"].tolist() == ["defense=madry eps=0.05", "defense=madry eps=0.1"]
    assert table["second"].tolist() == ["defense=standard eps=0.05", "defense=standard eps=0.1"]
    assert table["seeds"].tolist() == [2, 2]
    assert table["c"].tolist() == ["30 30"] * 2


def test_seeds_of_evaluations_stay_apart_from_those_of_trainings(sweep: Sweep) -> None:
    """Two evaluations of one network are no two networks."""
    evaluate(sweep, "seed=0", radii=(0.1,))
    evaluate(sweep, "seed=1", radii=(0.1,))
    assert [setting.words for setting in found(sweep)] == [
        f"defense={defense} seed={seed}" for seed in (0, 1) for defense in ("standard", "madry")
    ]


def test_the_table_has_what_distinguishes_the_trainings(sweep: Sweep) -> None:
    evaluate(sweep)
    records.write_table(sweep.folder)
    table = pd.read_csv(sweep.folder / "sweep.csv")
    assert list(table)[:5] == ["job", "defense", "seed", "checkpoint", "eps"]
    row = table[(table["attack"] == "worst_case") & (table["job"] == 7)].iloc[0]
    assert row[["defense", "seed", "checkpoint", "eps"]].tolist() == [
        "madry", 1, "runs/madry-1", 0.1
    ]  # fmt: skip


def test_evaluations_of_earlier_versions_are_told_apart_by_their_checkpoints(sweep: Sweep) -> None:
    for name in "ab":
        sweep.add(f"checkpoint={name}", clean=flags(5), manifest={"files": []})
    assert [setting.words for setting in found(sweep)] == ["checkpoint=a", "checkpoint=b"]


def test_a_baseline_among_trained_models_is_not_known_before() -> None:
    Comparison.of("defense=standard", None).check({"checkpoint": ["a", "b"], "eps": ["0.1"]})


# --- on the command line -------------------------------------------------------------------------

TINY = ["dataset=synthetic", "dataset.train_size=80", "dataset.validation=16", "device=cpu",
        "dataset.test_size=24", "evaluation=quick", "evaluation.audit=false",
        "evaluation.attacks.apgd_ce.steps=5", "-m"]  # fmt: skip
TRAIN = ["model=linear", "epochs=1", "defense=standard,madry", "eps=0.1", "seed=0,1"]


def test_runs_that_are_evaluated_again_give_the_table_of_their_sweep(
    command_line: CommandLine, tmp_path: Path
) -> None:
    """At the radius of their training; at another one, too, there are two seeds of each defense."""
    answer = command_line.run(*TINY, *TRAIN, "hydra.sweep.dir=s", cwd=tmp_path)
    assert answer.code == 0, answer.said
    again = ["stages=[evaluate]", "checkpoint=s/0,s/1,s/2,s/3", "eps=0.1,0.2", "hydra.sweep.dir=t"]
    answer = command_line.run(*TINY, *again, "sweep.baseline=defense=standard", cwd=tmp_path)
    assert answer.code == 0, answer.said
    before, after = ((tmp_path / name / "sweep.md").read_text() for name in "st")
    lines = [line for line in before.splitlines() if line.startswith(("| standard", "| madry"))]
    assert len(lines) == 2
    for line in lines:
        defense, seeds, figures = line.removeprefix("| ").split(" | ", 2)
        assert f"| {defense} | 0.1 | {seeds} | {figures}" in after
        assert f"| {defense} | 0.2 | {seeds} | " in after
