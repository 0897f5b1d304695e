"""The attack that a model was trained with, as reports name it."""

from collections.abc import Mapping
from typing import Any

from robusttrain.attacks import Attacking, Bounded, Iterated, NoThreat, parts
from robusttrain.attacks.none import is_none
from robusttrain.config.run_config import Config

# The name in reports, and in the names of a run.
TRAIN_ATTACK = "train_attack"

# The option of an attack that belongs to a defense only.
OWN_ATTACK = "attack@defense.attack"

# For a defense that crafts adversarial images itself, whatever `attack` is.
BUILT_IN = "built-in"
NONE = "none"
UNKNOWN = ""

# The reference to the attack of the run, in the YAML of a defense.
OF_THE_RUN = "${attack}"


def training_attack(config: Config, plain: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The option of the training attack, a hyphen, and its number of steps, such as `pgd-10`.

    It is `none` if training uses clean images, `built-in` if the defense has its own attack, and
    empty if that is unknown. If the number of steps grows, all numbers are listed: `pgd-2/5/10`.

    Parameters
    ----------
    config
        The configuration of the run, with every component built.
    plain
        The same configuration as plain containers, with its references.
    names
        The chosen option of each group.
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
    """The option that chose the attack in `node`, or the name of its class."""
    chosen = names["attack"] if node == OF_THE_RUN else names.get(OWN_ATTACK)
    return chosen or type(attack).__name__
