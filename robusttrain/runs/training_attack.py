"""The attack that a model was trained with, as reports name it."""

from collections.abc import Mapping
from typing import Any

from robusttrain.attacks import Attacking, Bounded, Iterated, NoThreat, parts
from robusttrain.attacks.none import is_none
from robusttrain.config.run_config import Config

# The name in reports, and in the names of a run.
TRAIN_ATTACK = "train_attack"

# An attack that a defense has instead of that of the run, among the options of a run.
OWN_ATTACK = "attack@defense.attack"

# A defense that makes its adversarial images by itself, whatever `attack` is.
BUILT_IN = "built-in"
NONE = "none"
UNKNOWN = ""

# What the YAML of a defense has for its attack where it takes that of the run.
OF_THE_RUN = "${attack}"


def training_attack(config: Config, plain: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The option of the attack of `defense`, and behind a hyphen its steps, such as `pgd-10`.

    It is `none` where clean images are trained on, and `built-in` where the defense knows an attack
    of its own only; empty where the defense does not say. Where steps grow, all their numbers are
    there: `pgd-2/5/10`.

    Parameters
    ----------
    config
        The run, built.
    plain
        The same as containers, with its references.
    names
        The option of each group.
    """
    defense = config.defense
    if is_none(defense) or isinstance(defense, NoThreat):
        return NONE
    if not isinstance(defense, Attacking):
        return BUILT_IN if isinstance(defense, Bounded) else UNKNOWN
    name = _name(defense.attack, plain["defense"].get("attack"), names)
    iterated = [part for part in parts(defense.attack) if isinstance(part, Iterated)]
    if not iterated:
        return name
    steps = config.training.curriculum.steps or [iterated[0].steps]
    return f"{name}-{'/'.join(str(number) for number in steps)}"


def _name(attack: object, node: object, names: Mapping[str, str]) -> str:
    """The option that the attack in `node` was chosen by, or the name of its class."""
    chosen = names["attack"] if node == OF_THE_RUN else names.get(OWN_ATTACK)
    return chosen or type(attack).__name__
