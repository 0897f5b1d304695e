"""Names of earlier versions, so that saved runs and old command lines still work."""

from collections.abc import Mapping
from typing import Any

# Modules, by the names that configurations of saved runs may hold.
MODULES = {
    "robusttrain.averaging": "robusttrain.optim.averaging",
    "robusttrain.config": "robusttrain.config.run_config",
    "robusttrain.curriculum": "robusttrain.training.curriculum",
    "robusttrain.evaluation.accuracy": "robusttrain.evaluation.settings",
    "robusttrain.evaluation.certification": "robusttrain.evaluation.settings",
    "robusttrain.optimizers": "robusttrain.optim.optimizers",
    "robusttrain.schedules": "robusttrain.optim.schedules",
    "robusttrain.training_settings": "robusttrain.training.settings",
    "robusttrain.weight_perturbation": "robusttrain.optim.weight_perturbation",
}


# Fields that classes no longer have, by the current names. Only one value was allowed for each.
DROPPED = {
    "robusttrain.attacks.friendly.FriendlyPGD": {
        "targets", "restarts", "keep_best", "stop_early",
    },
}  # fmt: skip


# Checks of an audit, by the names in older files `audit.csv`.
CHECKS = {
    "gradients that are no numbers: %": "non-finite gradients, %",
    "passes that gave no numbers: %": "non-finite outputs, %",
}


# Keys of the configuration, in full. A key stays in its section: only its last part changes.
KEYS = {"training.curriculum.smooth": "training.curriculum.per_batch"}


# Fields of `training.overfitting.TrainingHistory`, which checkpoints keep.
HISTORY = {
    "rate_share": "lr_factor",
    "in_epoch": "rollbacks_in_epoch",
    "most": "microbatch_size",
}


def history(state: Mapping[str, Any]) -> dict[str, Any]:
    """The stored history of a training, with the current names of its fields."""
    return {HISTORY.get(key, key): value for key, value in state.items()}


IBP, MTL_IBP = "robusttrain.defenses.ibp.IBP", "robusttrain.defenses.ibp.MTLIBP"


def target(name: str) -> str:
    """The current dotted name of the class `name`."""
    module, _, own = name.rpartition(".")
    return f"{MODULES[module]}.{own}" if module in MODULES else name


def override(word: str) -> str:
    """A word of the command line, such as `++a.b=1` or `~a.b`, with the current key."""
    name, equals, value = word.partition("=")
    key = name.lstrip("+~")
    return f"{name.removesuffix(key)}{KEYS.get(key, key)}{equals}{value}"


def config(node: Any, section: str = "") -> Any:
    """A stored configuration, of plain containers, with the current names.

    `section` is the full key of `node`, with a dot behind it, or empty for a whole configuration.
    """
    if isinstance(node, dict):
        own = target(str(node.get("_target_", "")))
        today = {
            _key(section, key): own if key == "_target_" else config(value, f"{section}{key}.")
            for key, value in node.items()
            if key not in DROPPED.get(own, ())
        }
        return _with_two_ibp(today)
    return [config(value) for value in node] if isinstance(node, list) else node


def _with_two_ibp(node: dict[str, Any]) -> dict[str, Any]:
    """A configuration in which IBP with an attack, once one class with IBP, is MTL-IBP."""
    defense, attack = node.get("defense"), node.get("attack")
    if not (isinstance(defense, dict) and isinstance(attack, dict)):
        return node
    attacks = attack.get("_target_") != "robusttrain.attacks.none.NoAttack"
    if defense.get("_target_") == IBP and attacks:
        return {**node, "defense": {**defense, "_target_": MTL_IBP}}
    return node


def yaml(text: str) -> str:
    """A stored configuration, as YAML, with the current names."""
    # Imported here, since it takes a while and a comparison of runs does without it.
    from omegaconf import OmegaConf

    node = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    today = config(node)
    return text if today == node else OmegaConf.to_yaml(OmegaConf.create(today))


def _key(section: str, key: str) -> str:
    """The current name of `key` inside its section."""
    current = KEYS.get(f"{section}{key}")
    return key if current is None else current.removeprefix(section)
