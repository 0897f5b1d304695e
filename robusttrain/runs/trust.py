"""What saved configurations and commands may do, since they may come from somebody else."""

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from robusttrain.checkpoints.external import CODE
from robusttrain.errors import InputError

# The packages whose classes every saved configuration may build. Functions, and classes of other
# packages, could run code or write files with arguments of somebody else's choice.
OWN = "robusttrain"
COMPONENTS = tuple(
    f"{OWN}.{package}."
    for package in ("attacks", "data", "defenses", "models", "noise", "optim", "training")
)

# The one function that is called: it reads a file as data, and checks what is in it. It loads
# programs, too, for callers who consent to that.
LOADER = "robusttrain.load_model"

# What a saved configuration may trust: what the user of this process trusts.
TRUST = "${trust}"

# References that its values may contain: to another key or to an environment variable. Other
# resolvers of OmegaConf can create nodes from text, and with them classes that were not checked.
REFERENCE = re.compile(r"\$\{([\w.]+|oc\.env:[\w.,/ -]+)\}")


# The configuration of robusttrain itself.
OWN_CONFIG = "--config-name=config"

# Keys of Hydra that a saved command may set. Others can run code, or move files.
OF_HYDRA = ("hydra.verbose",)

# How messages refer to it.
CONFIGURATION = "the checkpoint's configuration"


def refuse_untrusted(node: Any, trusted: Sequence[str]) -> None:
    """Refuse classes and functions of other packages, resolvers other than references, and trust.

    Components of robusttrain are allowed, and classes and functions of the packages in `trusted`.

    Raises
    ------
    InputError
        If a value in `node` names such a class, function or resolver, or extends the trust.
    """
    for mapping in _mappings(node):
        # In every mapping, since a command can set the keys of a target one by one.
        if mapping.get("trust", TRUST) != TRUST:
            problem = f"would trust {_in_line(mapping['trust'])} when it loads another run"
            raise InputError(CONFIGURATION, allowed=f"it must be trust: {TRUST}", problem=problem)
        if "_target_" in mapping:
            _refuse_target(str(mapping["_target_"]), trusted)
    for value in _leaves(node):
        if "${" in REFERENCE.sub("", str(value)):
            allowed = "only references to keys and environment variables are allowed there"
            raise InputError(
                CONFIGURATION, allowed=allowed, problem=f"would compute {_in_line(value)}"
            )


def trusted_words(words: Sequence[str], trust: Sequence[str], source: str) -> list[str]:
    """The saved command line `words`, as far as a user allows who trusts `trust`.

    Their own `trust` is replaced. Options of Hydra, its keys and targets outside of the trusted
    packages need consent, by `CODE` in `trust`.

    Raises
    ------
    InputError
        If a word needs consent that is not given; `source` names the file for the message.
    """
    if CODE in trust:
        return list(words)
    own = [word for word in words if not word.lstrip("+").startswith("trust=")]
    for word in own:
        if word != OWN_CONFIG:
            _refuse_word(word, trust, source)
    return [*own, *([f"trust=[{','.join(trust)}]"] if trust else [])]


def trust_in(word: str) -> list[str]:
    """The packages in a word `trust=[...]`, or no packages if it has another form."""
    override = _parsed(word)
    value = None if override is None else override.value()
    return [str(name) for name in value] if isinstance(value, list) else []


def _refuse_word(word: str, trust: Sequence[str], source: str) -> None:
    override = _parsed(word)
    if override is None or override.is_sweep_override() or _is_of_hydra(override):
        problem = f"contains {_in_line(word)}, which can run code"
        allowed = f"if you trust its author, add trust=[{CODE}]"
        raise InputError(source, allowed=allowed, problem=problem)
    name = override.key_or_group.rpartition(".")[2]
    value = override.value()
    node = {name: value if isinstance(value, dict | list) else str(value)}
    try:
        refuse_untrusted(node, trust)
    except InputError as error:
        raise error.of(source) from error


def _is_of_hydra(override: Override) -> bool:
    """Whether a key, or the place of an option, belongs to Hydra and may not be set."""
    places = (override.key_or_group, override.package or "")
    return any(re.match(r"hydra\b", p) is not None and p not in OF_HYDRA for p in places)


def _parsed(word: str) -> Override | None:
    """The override in a word; None if it is an option of the command line, or no override."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _in_line(word: object) -> str:
    """Text of a file in a message of one line."""
    return " ".join(str(word).split())


def _refuse_target(target: str, trusted: Sequence[str]) -> None:
    if target == LOADER or _is_defined_in(target, trusted):
        return
    built = f"would build {_in_line(target)}"
    problem = f"{built}, which is no component of robusttrain"
    allowed = "if you trust it, name its package in trust=[...]"
    if target.partition(".")[0] in trusted:
        problem = f"{built}, which is no class or function of its package"
        allowed = "an imported one is named by the package that defines it"
    raise InputError(CONFIGURATION, allowed=allowed, problem=problem)


def _is_defined_in(target: str, trusted: Sequence[str]) -> bool:
    """Whether a dotted name is one of `COMPONENTS`, or a class or function of `trusted`.

    The prefix of the name proves nothing: a module also contains what it imports.
    """
    module, _, name = target.rpartition(".")
    if module.partition(".")[0] not in (OWN, *trusted):
        return False
    try:
        value = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return False
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return False
    if value.__module__.startswith(f"{OWN}."):
        return inspect.isclass(value) and f"{value.__module__}.".startswith(COMPONENTS)
    return value.__module__.partition(".")[0] in trusted


def _mappings(node: Any) -> Iterator[Mapping[Any, Any]]:
    """The mappings in a configuration, from outside inwards."""
    if isinstance(node, Mapping):
        yield node
        for value in node.values():
            yield from _mappings(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _mappings(value)


def _leaves(node: Any) -> Iterator[Any]:
    """The values in a configuration that are no containers."""
    if isinstance(node, Mapping):
        for value in node.values():
            yield from _leaves(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _leaves(value)
    else:
        yield node
