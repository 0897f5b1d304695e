"""Names of earlier versions."""

import dataclasses
import importlib

import pytest
from omegaconf import OmegaConf

from robusttrain import renames

# The classes that configurations of saved runs name in modules that have moved.
MOVED = {
    "robusttrain.averaging": ["EMA", "NoAveraging", "SWA"],
    "robusttrain.config": ["Config"],
    "robusttrain.curriculum": ["Curriculum"],
    "robusttrain.evaluation.accuracy": ["Evaluation"],
    "robusttrain.evaluation.certification": ["Certification"],
    "robusttrain.optimizers": ["Adam", "AdamW", "SGD"],
    "robusttrain.schedules": ["Constant", "Cosine", "OneCycle", "Step"],
    "robusttrain.training_settings": ["Training"],
    "robusttrain.weight_perturbation": ["AWP", "NoPerturbation"],
}
CLASSES = [f"{module}.{name}" for module, names in MOVED.items() for name in names]


def test_every_entry_is_tested() -> None:
    assert renames.MODULES.keys() == MOVED.keys()


@pytest.mark.parametrize("before", CLASSES)
def test_a_class_is_found_where_it_is_today(before: str) -> None:
    module, _, name = renames.target(before).rpartition(".")
    assert getattr(importlib.import_module(module), name).__module__ == module
    # A name of today stays what it is.
    assert renames.target(f"{module}.{name}") == f"{module}.{name}"


@pytest.mark.parametrize("before", CLASSES)
def test_classes_are_renamed_wherever_they_stand(before: str) -> None:
    node = {"_target_": "mine.Other", "parts": [{"a": {"_target_": before, "lr": 0.1}}], "n": None}
    renamed = renames.config(node)
    assert renamed["parts"][0]["a"] == {"_target_": renames.target(before), "lr": 0.1}
    assert {**renamed, "parts": []} == {**node, "parts": []}
    text = OmegaConf.to_yaml(OmegaConf.create(node))
    assert renames.yaml(text) == OmegaConf.to_yaml(OmegaConf.create(renamed))


@pytest.mark.parametrize("owner", renames.DROPPED)
def test_fields_that_are_gone_are_left_out(owner: str) -> None:
    module, _, name = owner.rpartition(".")
    component = getattr(importlib.import_module(module), name)
    fields = {field.name for field in dataclasses.fields(component)}
    assert not fields & renames.DROPPED[owner]
    node = {"_target_": owner, "eps": 0.1, **dict.fromkeys(renames.DROPPED[owner], None)}
    assert renames.config({"attack": node}) == {"attack": {"_target_": owner, "eps": 0.1}}


IBP, MTL_IBP = "robusttrain.defenses.ibp.IBP", "robusttrain.defenses.ibp.MTLIBP"
NONE, PGD = "robusttrain.attacks.none.NoAttack", "robusttrain.attacks.pgd.PGD"


@pytest.mark.parametrize(
    ("before", "attack", "today"),
    [(IBP, PGD, MTL_IBP), (IBP, NONE, IBP), (MTL_IBP, PGD, MTL_IBP), ("mine.IBP", PGD, "mine.IBP")],
)
def test_bounds_with_an_attack_are_a_class_of_their_own(
    before: str, attack: str, today: str
) -> None:
    """Both were one class, told apart by the attack that the run has chosen."""
    node = {
        "attack": {"_target_": attack, "eps": 0.1},
        "defense": {"_target_": before, "attack": "${attack}", "weight": 0.5},
    }
    renamed = renames.config(node)
    assert renamed["defense"] == {**node["defense"], "_target_": today}
    assert renamed["attack"] == node["attack"]
