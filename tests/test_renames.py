"""Names of earlier versions."""

import dataclasses
import importlib

import hydra
import pytest
from omegaconf import OmegaConf

from robusttrain import renames
from robusttrain.config import schema
from robusttrain.config.folders import CONF
from robusttrain.training.overfitting import TrainingHistory

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


# The keys that have other names today, with a value for each.
OLD_KEYS = {"training.curriculum.smooth": "true"}


def test_every_entry_is_tested() -> None:
    assert renames.MODULES.keys() == MOVED.keys()
    assert renames.KEYS.keys() == OLD_KEYS.keys()


@pytest.mark.parametrize("before", CLASSES)
def test_a_class_is_found_where_it_is_today(before: str) -> None:
    module, _, name = renames.target(before).rpartition(".")
    assert getattr(importlib.import_module(module), name).__module__ == module
    # A current name stays as it is.
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


def test_a_stored_history_has_the_current_fields() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingHistory)}
    assert set(renames.HISTORY.values()) <= fields
    assert not set(renames.HISTORY) & fields
    # As version 0.1.0 stored it.
    stored = {
        "rate_share": 0.5, "rollbacks": 2, "in_epoch": 1, "best_pgd": 0.7, "stopped": False,
        "most": 16,
    }  # fmt: skip
    assert TrainingHistory(**renames.history(stored)) == TrainingHistory(0.5, 2, 1, 0.7, False, 16)
    current = dataclasses.asdict(TrainingHistory(0.25))
    assert renames.history(current) == current


def nested(key: str, value: object) -> dict[str, object]:
    """A configuration with one key."""
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


@pytest.mark.parametrize("old", renames.KEYS)
def test_a_key_of_a_saved_configuration_has_the_current_name(old: str) -> None:
    new = renames.KEYS[old]
    assert renames.config(nested(old, True)) == nested(new, True)
    assert renames.config(nested(new, False)) == nested(new, False)
    # The same word in another section is another key.
    other = nested(f"model.{old}", 1)
    assert renames.config(other) == other


@pytest.mark.parametrize("old", renames.KEYS)
def test_a_key_stays_in_its_section_and_the_configuration_has_it(old: str) -> None:
    new = renames.KEYS[old]
    assert old.rpartition(".")[0] == new.rpartition(".")[0]
    schema.register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", [f"{new}={OLD_KEYS[old]}"])
    assert str(OmegaConf.select(composed, new)).lower() == OLD_KEYS[old]


@pytest.mark.parametrize("old", renames.KEYS)
@pytest.mark.parametrize("form", ["{}=1", "{}=0,1", "+{}=1", "++{}=1", "~{}", "~{}=1", "{}="])
def test_a_word_of_the_command_line_has_the_current_key(old: str, form: str) -> None:
    assert renames.override(form.format(old)) == form.format(renames.KEYS[old])


@pytest.mark.parametrize(
    "word", ["defense=madry", "-m", "", "~", "a=training.curriculum.smooth", "--cfg", "smooth=1"]
)
def test_other_words_stay(word: str) -> None:
    assert renames.override(word) == word


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
