"""Settings without effect: keys of the command line that a run does not read.

A run reads its components, and the keys that they refer to, such as `${attack}` in the YAML of a
defense. Some fields have no effect at the values of others: a component knows those of its own
(`Conditional`), and `RULES` has those that depend on several components.

`stages` does not matter: a user who leaves out a stage knows that its settings have no effect. The
same arguments may thus serve a training and an evaluation.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from robusttrain.attacks import states_threat, threats
from robusttrain.attacks.none import is_none
from robusttrain.config.run_config import Config
from robusttrain.defenses import Unsupervised, WithModels
from robusttrain.defenses.distill import Distill
from robusttrain.defenses.sabr import SABR
from robusttrain.errors import InputError
from robusttrain.training.overfitting import searches


@runtime_checkable
class Conditional(Protocol):
    """A component with fields that have no effect at some values of its other fields."""

    def unused(self) -> Mapping[str, str]:
        """The fields without effect; each with the field that is the cause, or with an empty text.

        The empty text stands for the component itself: it never uses the field.
        """


@runtime_checkable
class Effective(Protocol):
    """A component that has no effect at some of its values, though Python may use it with them."""

    def refuse_without_effect(self) -> None:
        """Raise `InputError` if it has no effect: a report would name it all the same."""


class Rule(NamedTuple):
    """Keys that a run reads under a condition only.

    Parameters
    ----------
    keys
        Full keys of components, or of fields.
    cause
        The key whose value decides. Messages name it.
    is_read
        Whether a run with a configuration reads them.
    reason
        Why it does not, for messages.
    """

    keys: tuple[str, ...]
    cause: str
    is_read: Callable[[Config], bool]
    reason: str = ""


# Keys that are only read where another key refers to them, and the component that does so.
READERS = {
    "attack": "defense",
    "epochs": "training",
    "batch_size": "training",
    "data_dir": "dataset",
    "download": "dataset",
    "trust": "checkpoint",
}


def _has_radius(config: Config) -> bool:
    return bool(threats(config.defense)) or not states_threat(config.defense)


def _extra(config: Config) -> str:
    """The file of extra images; empty without."""
    return str(getattr(config.dataset, "extra", None) or "")


RULES = (
    Rule(("dataset.extra_share",), "dataset.extra", lambda config: bool(_extra(config))),
    Rule(
        ("dataset.extra_labels",), "dataset.extra",
        lambda config: _extra(config).endswith(".npy"),
    ),
    Rule(
        ("training.validation_attack",), "dataset.validation",
        lambda config: config.dataset.validation > 0,
    ),
    Rule(
        ("training.label_smoothing",), "defense",
        lambda config: not isinstance(config.defense, Distill),
        "its targets are outputs of the teacher",
    ),
    Rule(
        ("training.label_smoothing", "training.on_overfit"), "defense",
        lambda config: not isinstance(config.defense, Unsupervised), "it reads no labels",
    ),
    Rule(
        (
            "training.curriculum.eps_warmup", "training.curriculum.eps_delay",
            "training.curriculum.smoothed", "training.curriculum.per_batch",
        ),
        "defense", _has_radius, "it has no radius",
    ),
    Rule(
        ("training.on_overfit",), "defense", lambda config: searches(config.defense),
        "it trains on clean images",
    ),
    Rule(
        ("training.trainable", "training.batch_norm", "training.l1"), "epochs",
        lambda config: config.epochs > 0, "nothing is trained",
    ),
    Rule(
        ("attack.eps",), "defense", lambda config: not isinstance(config.defense, SABR),
        "it attacks within its own radius",
    ),
    Rule(
        ("model.initialisation",), "checkpoint", lambda config: config.checkpoint is None,
    ),
    Rule(
        ("optimizer.layer_decay",), "training.trainable",
        lambda config: config.training.trainable != "head", "the head has the rate optimizer.lr",
    ),
)  # fmt: skip


def unread(
    config: Config, plain: Mapping[str, Any], names: Mapping[str, str], overrides: Sequence[str]
) -> dict[str, InputError]:
    """A refusal for each of the `overrides` that nothing reads, by its key, in their order.

    Parameters
    ----------
    config
        The configuration of a run, with every component built.
    plain
        The same configuration as plain containers, with its references.
    names
        The chosen option of each group.
    overrides
        Words of the command line, such as `attack.steps=20`.
    """
    run = _Run(config, plain, names)
    found = {}
    for override in overrides:
        unused = [key for key in _keys(override) if not run.reads(key)]
        if unused:
            found[destination(override)] = run.refusal(override, unused[0])
    return found


def refuse_without_effect(
    config: Config, plain: Mapping[str, Any], names: Mapping[str, str]
) -> None:
    """Raise `InputError` if a component has no effect at its values, though the run reads it.

    The arguments are those of `unread`.
    """
    run = _Run(config, plain, names)
    for where, built in run.components:
        key = where.removesuffix(".")
        if isinstance(built, Effective) and run.reads(key):
            try:
                built.refuse_without_effect()
            except InputError as error:
                raise error.under(key) from error


def refuse(unread: Mapping[str, InputError]) -> None:
    """Raise the first refusal, if there is one."""
    for refusal in unread.values():
        raise refusal


def destination(override: str) -> str:
    """The key that an override sets; in `attack@evaluation.attacks.pgd=pgd20` it follows the @."""
    return override.lstrip("+~").partition("=")[0].rpartition("@")[2].removeprefix("_global_.")


class _Run:
    """What a run reads of its configuration."""

    def __init__(self, config: Config, plain: Mapping[str, Any], names: Mapping[str, str]) -> None:
        self.config, self.plain, self.names = config, plain, names
        self.leaves = dict(_leaves(plain, ""))
        broken = [rule for rule in RULES if not rule.is_read(config)]
        self.reasons = {key: rule.reason for rule in broken for key in rule.keys}
        self.components = list(_components(plain, config, ""))
        self.causes: dict[str, str] = {}
        for where, built in self.components:
            self.causes |= _unused(where, built)
        self.causes |= _unused("model.", config.initial_weights)
        self.causes |= {key: rule.cause for rule in broken for key in rule.keys}
        self.read = self._all_read()

    def reads(self, key: str) -> bool:
        """Whether the run reads `key`, or a key below it."""
        below = [leaf for leaf in self.leaves if _covers(key, leaf)]
        if below:
            return not self.read.isdisjoint(below)
        section = key.rpartition(".")[0]
        # A removed key is as useful as the section that it was in. Hydra's groups have no section.
        return self.reads(section) if section else True

    def refusal(self, override: str, key: str) -> InputError:
        """The refusal of an override whose `key` is not read."""
        covering = next((covered for covered in self.causes if _covers(covered, key)), None)
        cause = self._cause_of_no_reference(key) if covering is None else self.causes[covering]
        reason = self.reasons.get(covering or "", "")
        if not reason and cause == "defense" and READERS.get(key.partition(".")[0]) == "defense":
            clean = is_none(self.config.defense) or not searches(self.config.defense)
            reason = "it trains on clean images" if clean else "it has an attack of its own"
        word, equals, value = override.lstrip("+").partition("=")
        problem = f"has no effect with {self._text(cause)}"
        return InputError(word, value if equals else ..., reason, problem)

    def _all_read(self) -> set[str]:
        """The keys without parts that the run reads."""
        effective = [key for key in self.leaves if self._has_effect(key)]
        pending = [key for key in effective if self._is_root(key)]
        read: set[str] = set()
        while pending:
            key = pending.pop()
            if key not in read:
                read.add(key)
                for target in _targets(key, self.leaves[key]):
                    pending += [leaf for leaf in effective if _covers(target, leaf)]
        return read

    def _is_root(self, key: str) -> bool:
        if key == "trust":
            return self.config.is_given or isinstance(self.config.defense, WithModels)
        return key.partition(".")[0] not in READERS

    def _has_effect(self, key: str) -> bool:
        return not any(_covers(covered, key) for covered in self.causes)

    def _cause_of_no_reference(self, key: str) -> str:
        """Why nothing that is read refers to `key`."""
        top = key.partition(".")[0]
        reader = READERS[top]
        for covered, cause in self.causes.items():
            refers = top in _targets(covered, self.leaves.get(covered))
            if _covers(covered, reader) or (_covers(reader, covered) and refers):
                return cause
        field = f"{reader}.{top}"
        return field if field in self.leaves else reader

    def _text(self, cause: str) -> str:
        """The cause as `key=value`; a component is named by its option, or by its class."""
        if cause in self.names:
            return f"{cause}={self.names[cause]}"
        value = OmegaConf.select(OmegaConf.create(dict(self.plain)), cause)
        if OmegaConf.is_dict(value):
            value = str(value["_target_"]).rpartition(".")[2]
        return f"{cause}={'null' if value is None else value}"


def _keys(override: str) -> list[str]:
    """The keys that an override sets: those inside, if its value is a dictionary."""
    key, value = destination(override), override.partition("=")[2]
    if not value.startswith("{"):
        return [key]
    parsed = OverridesParser.create().parse_override(override).value()
    assert isinstance(parsed, dict), "Hydra has accepted it"
    return [inner for inner, _ in _leaves({str(k): v for k, v in parsed.items()}, f"{key}.")]


def _leaves(node: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """(full key, value) of every value that has no keys of its own."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def _components(node: Mapping[str, Any], built: object, where: str) -> Iterator[tuple[str, object]]:
    """(full key with a dot behind it, component) of `built` and of all components in it."""
    yield where, built
    for key, below in node.items():
        if isinstance(below, Mapping):
            part = built.get(key) if isinstance(built, Mapping) else getattr(built, key, None)
            yield from _components(below, part, f"{where}{key}.")


def _unused(where: str, built: object) -> dict[str, str]:
    """The unused fields of a component, with their causes; full keys."""
    found = {}
    if isinstance(built, Conditional):
        for key, cause in built.unused().items():
            found[f"{where}{key}"] = f"{where}{cause}".removesuffix(".")
    return found


def _covers(key: str, other: str) -> bool:
    """Whether `other` is `key`, or lies below it."""
    return f"{other}.".startswith(f"{key}.")


# A reference to another key, with the dots of a relative one apart.
_REFERENCE = re.compile(r"\$\{(\.*)([\w.]+)\}")


def _targets(key: str, value: object) -> list[str]:
    """The full keys that the value of `key` refers to."""
    found = []
    for dots, name in _REFERENCE.findall(str(value)):
        section = key.split(".")[: -len(dots)] if dots else []
        found.append(".".join([*section, name]))
    return found
