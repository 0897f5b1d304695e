"""What had another name in an earlier version: saved runs are read with the names of today."""

import re
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


def target(name: str) -> str:
    """The dotted name that the class `name` has today."""
    module, _, own = name.rpartition(".")
    return f"{MODULES[module]}.{own}" if module in MODULES else name


def config(node: Any) -> Any:
    """A stored configuration, of plain containers, with the names of today."""
    if isinstance(node, dict):
        return {
            key: target(value) if key == "_target_" else config(value)
            for key, value in node.items()
        }
    return [config(value) for value in node] if isinstance(node, list) else node


def yaml(text: str) -> str:
    """A stored configuration, as YAML, with the names of today."""
    return re.sub(r"(?<=_target_: )\S+", lambda found: target(found[0]), text)
