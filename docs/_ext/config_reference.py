"""The configuration reference: every option of a group; every key with type, range and default.

`.. config-run::` lists the keys of a whole run, `.. config-group:: GROUP` those of a group, and
`.. config-experiments::` the recipes. Everything is read from the dataclasses and from conf/, and a
key without a meaning fails the build.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

import yaml
from allowed_values import allowed_values
from components import parsed, path
from docutils import nodes
from plain_docstrings import as_rst, paragraphs
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from robusttrain.checkpoints.initial_weights import InitialWeights
from robusttrain.config import schema
from robusttrain.config.folders import CONF
from robusttrain.config.model_section import Normalised
from robusttrain.config.run_config import Config
from robusttrain.training.settings import Training

log = logging.getLogger(__name__)

PARAMETERS = re.compile(r"\n\nParameters\n-{3,}\n(.*?)(?:\n\n\w[\w ]*\n-{3,}\n|\Z)", re.DOTALL)


# --- the keys of a dataclass ------------------------------------------------------------------


def meanings(component: type) -> dict[str, str]:
    """The description of each field, in the docstring of a class or of its bases."""
    found: dict[str, str] = {}
    docstrings = [inspect.cleandoc(base.__doc__ or "") for base in component.__mro__]
    for docstring in docstrings:
        for names, text in _parameters(docstring):
            for name in names:
                found.setdefault(name, text)
    # A docstring without a section of parameters describes its fields in sentences.
    for docstring in docstrings:
        for sentence in _sentences(docstring):
            for name in re.findall(r"`(\w+)(?:=[^`]*)?`", sentence):
                found.setdefault(name, sentence)
    return found


def _parameters(docstring: str) -> Iterator[tuple[list[str], str]]:
    section = PARAMETERS.search(docstring)
    names: list[str] = []
    text: list[str] = []
    for line in section[1].splitlines() if section else []:
        if line and not line.startswith(" "):
            if names:
                yield names, " ".join(text)
            names, text = [name.strip() for name in line.split(":")[0].split(",")], []
        else:
            text.append(line.strip())
    if names:
        yield names, " ".join(text)


def _sentences(docstring: str) -> Iterator[str]:
    for paragraph in paragraphs(docstring):
        yield from re.split(r"(?<=[.;])\s+(?=[A-Z`])", paragraph)


class Key(NamedTuple):
    """A key as the reference shows it; `allowed` is empty if every value of the type is."""

    name: str
    kind: str
    allowed: str
    default: str
    meaning: str


def keys(component: type, prefix: str) -> Iterator[Key]:
    """The key of each field, followed by the keys of settings in it.

    The groups themselves, which are fields of a run, are left out.
    """
    hints, texts = get_type_hints(component), meanings(component)
    allowed = allowed_values(component)
    if component is Config:
        # A run passes `epochs` and `batch_size` on to its training, which checks them.
        allowed = allowed_values(Training) | allowed
    for member in dataclasses.fields(component):
        if (
            not member.init
            or member.metadata
            or (component is Config and member.name in schema.GROUPS)
        ):
            continue
        hint, key = hints[member.name], f"{prefix}{member.name}"
        if member.name not in texts:
            log.warning("%s.%s has no meaning in a docstring", path(component), member.name)
        yield Key(
            key, kind(hint), allowed.get(member.name, ""), default(member),
            texts.get(member.name, ""),
        )  # fmt: skip
        for nested in _settings(hint):
            yield from keys(nested, f"{key}.")


def _settings(hint: Any) -> list[type]:
    """The nested settings that a field may hold."""
    return [
        each
        for each in (hint, *get_args(hint))
        if dataclasses.is_dataclass(each) and each.__module__.endswith(SETTINGS)
    ]


def _nested(component: type) -> list[type]:
    return [each for hint in get_type_hints(component).values() for each in _settings(hint)]


# Modules with dataclasses that are nested settings instead of options of a group.
SETTINGS = (".settings", ".curriculum")


def kind(hint: Any) -> str:
    """A type, in the terms of a command line."""
    if hint in (int, float, str, bool):
        return {int: "integer", float: "number", str: "text", bool: "true or false"}[hint]
    if hint is NoneType:
        return "null"
    if inspect.isclass(hint) and issubclass(hint, Enum):
        return " | ".join(member.value for member in hint)
    arguments = get_args(hint)
    if str(hint).startswith("list"):
        return (
            f"list of {kind(arguments[0])}s"
            if arguments[0] in (int, float)
            else f"list of {kind(arguments[0])}"
        )
    if "Mapping" in str(hint):
        return "names with components"
    if arguments:
        return " or ".join(kind(argument) for argument in arguments)
    if _settings(hint):
        return "settings of their own"
    return "component" if _is_protocol(hint) else hint.__name__


def _is_protocol(hint: Any) -> bool:
    return getattr(hint, "_is_protocol", False) or dataclasses.is_dataclass(hint)


def default(member: "dataclasses.Field[Any]") -> str:
    """A default as a command line would give it."""
    if member.default is not dataclasses.MISSING:
        return _word(member.default)
    if member.default_factory is not dataclasses.MISSING:
        value = member.default_factory()
        return "" if dataclasses.is_dataclass(value) else _word(value)
    return ""


def _word(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_word, value))}]"
    return str(value)


def key_list(component: type, prefix: str) -> list[str]:
    """A definition list of the keys of a dataclass."""
    lines = []
    for key in keys(component, prefix):
        facts = [f"*type:* {key.kind}"]
        facts += [f"*allowed:* {as_rst(key.allowed)}"] if key.allowed else []
        facts += [f"*default:* ``{key.default}``"] if key.default else []
        lines += [f"``{key.name}``", f"    {' · '.join(facts)}", ""]
        lines += [f"    {as_rst(key.meaning)}", ""]
    return lines


# --- the options in conf/ ---------------------------------------------------------------------


def words(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What a YAML sets, as arguments of a command line."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from words(value, f"{prefix}{key}.")
        elif key != "defaults":
            yield f"{prefix}{key}={_word(value)}"


def chosen(group: str, defaults: list[Any]) -> Iterator[str]:
    """The options that a YAML takes from other groups, as arguments of a command line."""
    for entry in defaults:
        if isinstance(entry, Mapping):
            for place, option in entry.items():
                name, _, inside = place.removeprefix("override ").lstrip("/").partition("@")
                where = "" if inside in ("", f"_global_.{name}") else f"@{group}.{inside}"
                yield f"{name}{where}={option}"
        elif entry != "_self_" and "/schema/" not in entry:
            yield f"{group}={entry}"


def built(defaults: list[Any]) -> str | None:
    """The name of the class that an option builds."""
    names = [entry for entry in defaults if isinstance(entry, str) and entry.endswith("@_here_")]
    return names[0].partition("@")[0].rpartition("/")[2] if names else None


def comment(file: Path) -> str:
    """The text of the comments at the top of a YAML."""
    found = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        found.append(line.lstrip("# ").strip())
    return " ".join(line for line in found if not line.startswith("@package"))


def option_list(group: str, classes: Mapping[str, type]) -> list[str]:
    lines = []
    for file in sorted((CONF / group).glob("*.yaml")):
        content = yaml.safe_load(file.read_text()) or {}
        defaults = content.get("defaults", [])
        name, text = built(defaults), comment(file)
        target = f" builds :py:class:`~{path(classes[name])}`" if name else ""
        lines += [f"``{group}={file.stem}``{target}"]
        lines += [f"    {as_rst(text)}", ""] if text else []
        # A recipe sets keys of all groups, an option those of its own.
        prefix = "" if group == "experiment" else f"{group}."
        given = [*chosen(group, defaults), *words(content, prefix)]
        sets = " ".join(f"``{word}``" for word in given)
        lines += [
            f"    {f'Sets {sets}' if given else 'Sets nothing: all keys have their defaults.'}",
            "",
        ]
    return lines


# --- the directives ---------------------------------------------------------------------------


def title(text: str) -> list[str]:
    return [text, "=" * len(text), ""]


class ConfigRun(SphinxDirective):
    """The keys of a run that belong to no group."""

    def run(self) -> list[nodes.Node]:
        return parsed(self, key_list(Config, ""))


class ConfigGroup(SphinxDirective):
    """The options of a group, and the keys of each of its classes."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        (group,) = self.arguments
        classes = {component.__name__: component for component in schema.components(group)}
        lines = [*title(f"Options of {group}"), *option_list(group, classes)]
        for name, component in classes.items():
            if any(component in _nested(other) for other in classes.values()):
                continue
            lines += [*title(f"Keys of {name}"), f":py:class:`~{path(component)}`: "]
            lines[-1] += as_rst(paragraphs(inspect.cleandoc(component.__doc__ or ""))[0])
            lines += ["", *(key_list(component, f"{group}.") or ["It has no keys.", ""])]
        if group == "model":
            lines += [*title("Keys of every model"), "They belong to no single architecture.", ""]
            lines += [*key_list(InitialWeights, "model."), *key_list(Normalised, "model.")]
        return parsed(self, lines)


class ConfigExperiments(SphinxDirective):
    """The recipes of several groups."""

    def run(self) -> list[nodes.Node]:
        return parsed(self, option_list("experiment", {}))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("config-run", ConfigRun)
    app.add_directive("config-group", ConfigGroup)
    app.add_directive("config-experiments", ConfigExperiments)
    return {"parallel_read_safe": True}
