"""What had another name in an earlier version: saved runs are read with the names of today."""

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


# Fields that classes no longer have, by the names of today. They had one value that was allowed.
DROPPED = {
    "robusttrain.attacks.friendly.FriendlyPGD": {
        "targets", "restarts", "keep_best", "stop_early",
    },
}  # fmt: skip


IBP, MTL_IBP = "robusttrain.defenses.ibp.IBP", "robusttrain.defenses.ibp.MTLIBP"


def target(name: str) -> str:
    """The dotted name that the class `name` has today."""
    module, _, own = name.rpartition(".")
    return f"{MODULES[module]}.{own}" if module in MODULES else name


def config(node: Any) -> Any:
    """A stored configuration, of plain containers, with the names of today."""
    if isinstance(node, dict):
        own = target(str(node.get("_target_", "")))
        today = {
            key: own if key == "_target_" else config(value)
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
    """A stored configuration, as YAML, with the names of today."""
    # Takes a while to import, which a comparison of runs need not wait for.
    from omegaconf import OmegaConf

    node = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    today = config(node)
    return text if today == node else OmegaConf.to_yaml(OmegaConf.create(today))
