"""Messages for expected errors, in at most two lines where Hydra and OmegaConf print many."""

import difflib
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml import YAMLError

from robusttrain import renames
from robusttrain.config.suggestions import did_you_mean, for_bare, groups, nearest
from robusttrain.errors import InputError, JobError, NonFiniteLossError, ProcessLostError

# Errors that are no defects of the program: they end it with a message instead of a traceback.
EXPECTED_ERRORS = (
    InputError,
    JobError,
    NonFiniteLossError,
    ProcessLostError,
    HydraException,
    OmegaConfBaseException,
    YAMLError,
    OSError,
)


# The beginning of Hydra's message about a file of the configuration.
_IN_FILE = re.compile(r"In '[^']*': ")

# The beginnings of what Hydra and OmegaConf say of several values, of a choice, and of no list.
_SEVERAL = re.compile(r"Ambiguous value for argument '(.*)'")
_CHOICE = re.compile(r"Invalid value '(.*)', expected one of \[(.*)\]")
_NO_LIST = re.compile(r"Invalid value assigned: \w+ is not a ListConfig, list or tuple")

# A value that is that of another key.
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def explain(error: BaseException) -> str:
    """The message of an expected error: it names the key, its value and what is allowed."""
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException):
        # A file of the configuration is at fault. Hydra does not chain its error to the cause.
        cause = cause or error.__context__
    if (message := _of_the_command_line(error)) is not None:
        return message
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _unknown_key(error, cause)
    if isinstance(cause, OmegaConfBaseException):
        return _wrong_value(error, cause)
    if isinstance(error, OSError) and error.strerror:
        subject = f"{error.filename} cannot be used" if error.filename else "a file cannot be used"
        place = "runs are written to hydra.run.dir, sweeps to hydra.sweep.dir"
        return f"{subject}: {error.strerror}\n({place})"
    first, *others = _lines(error)
    return "\n".join([first, " ".join(others)]).strip()


def _of_the_command_line(error: BaseException) -> str | None:
    """The message for a word that cannot be used, or for a value that is not there."""
    if isinstance(error, OverrideParseException):
        return _not_parsed(str(error.override))
    if several := _SEVERAL.match(str(error)):
        return _several_values(several[1])
    if isinstance(error, MissingConfigException):
        return _missing(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing: add {error.full_key}=... to the command line"
    if isinstance(error, InterpolationResolutionError) and error.parent_node is not None:
        return _unresolved(error)
    return None


def _not_parsed(word: str) -> str:
    """The message for a word that is no `key=value`."""
    meant = did_you_mean(for_bare(word)) if "=" not in word else ""
    return f"{word} cannot be parsed as key=value: {meant or _in_quotes(word)}"


def _several_values(word: str) -> str:
    """The message for `key=a,b` without `-m`."""
    key, _, values = word.partition("=")
    as_list = shlex.quote(f"{key}=[{values}]")
    hint = "" if key in groups() else f"; if they are one value, give {as_list}"
    return f"{word} has several values: add -m to run a job for each{hint}"


def _in_quotes(word: str) -> str:
    """How to give the value of `word` as text, if that is possible."""
    key, sign, value = word.partition("=")
    quoted = f'{key}{sign}"{value}"'
    try:
        OverridesParser.create().parse_override(quoted)
    except HydraException:
        return "it must have this form"
    return f"if its value is text, give {shlex.quote(quoted)}"


def _unresolved(error: InterpolationResolutionError) -> str:
    """The message for a value that refers to nothing, with the key that the user gave it to."""
    plain = OmegaConf.to_container(error.parent_node._get_root(), resolve=False)
    key, seen = str(error.full_key), set[str]()
    while (other := _REFERENCE.fullmatch(str(_raw(plain, key)))) and other[1] not in seen:
        value = _raw(plain, other[1])
        if not isinstance(value, str) or "${" not in value:
            break
        seen.add(key)
        key = other[1]
    return f"{key}={_raw(plain, key)} is not allowed: {_lines(error)[0]}"


def _raw(plain: Any, key: str) -> Any:
    """The value of a full key, before references are replaced; None if there is no such key."""
    for name in key.split("."):
        plain = plain.get(name) if isinstance(plain, dict) else None
    return plain


def _missing(error: MissingConfigException) -> str:
    """The message for an option that does not exist, or that needs an extra."""
    file = str(error.missing_cfg_file)
    group, _, option = file.rpartition("/")
    if not error.options:
        return extra(file) or " ".join(_lines(error))
    return extra(file) or _no_choice(f"{group}={option}", option, error.options)


def _no_choice(word: str, given: str, allowed: Sequence[str]) -> str:
    """The message for a `word` whose value is none of those that are allowed."""
    key = word.partition("=")[0]
    meant = did_you_mean([f"{key}={choice}" for choice in nearest(given, allowed)])
    every = f"it must be one of {', '.join(allowed)}"
    return (
        f"{word} is not allowed: {meant}\n({every})" if meant else f"{word} is not allowed: {every}"
    )


def _wrong_value(error: BaseException, cause: OmegaConfBaseException) -> str:
    """The message for a value of the wrong type."""
    override = str(error).partition("Error merging override ")[2]
    line, problem = _lines(error)[0].removesuffix(":"), _lines(cause)[0]
    if override and (choice := _CHOICE.match(problem)):
        return _no_choice(override, choice[1], choice[2].split(", "))
    if override and _NO_LIST.match(problem):
        key, _, value = override.partition("=")
        return f"{override} is not allowed: {did_you_mean([f'{key}=[{value}]'])}"
    place = f"{override} is not allowed" if override else f"{line}: {cause.full_key}"
    return f"{place}: {problem}"


def _unknown_key(error: BaseException, cause: OmegaConfBaseException) -> str:
    """The message for an unknown key: similar keys, and all keys next to it.

    Those of the top level are many, and are left out if one is similar.
    """
    key = str(cause.full_key)
    override = str(error).partition("config use +")[2]
    parent = cause.parent_node
    assert isinstance(parent, Container)
    typed = override.partition("=")[0] or key
    near = [renames.KEYS[key]] if key in renames.KEYS else _near(key, typed, parent._get_root())
    hint = f", {did_you_mean(near)}" if near else ""
    section = key.rpartition(".")[0]
    there = ", ".join(_own_keys(parent)) or "none"
    listing = "" if near and not section else f"\nKeys of {section or 'the top level'}: {there}"
    file = _IN_FILE.match(str(error))
    word = override or (f"{file[0]}{key}" if file else key)
    return f"{word} is not allowed: no such key{hint}{listing}"


def no_such_key(word: str, key: str, there: Iterable[str]) -> InputError:
    """The refusal of a `word` of the command line, by a component that only has the keys `there`.

    Parameters
    ----------
    word
        The word, such as `dataset.pth=DIR`.
    key
        Its key, up to the part that is unknown.
    there
        The keys of the component.
    """
    where, _, last = key.rpartition(".")
    near = nearest(last, there := list(there))
    hint = f", {did_you_mean([f'{where}.{each}' for each in near])}" if near else ""
    problem = f"is not allowed: no such key{hint}\nKeys of {where}: {', '.join(there) or 'none'}"
    return InputError(word, problem=problem)


def wrong_type(word: str, error: OmegaConfBaseException) -> InputError:
    """The refusal of a `word` of the command line whose value has another type than its key."""
    return InputError(word, problem=f"is not allowed: {_lines(error)[0]}")


def _near(key: str, typed: str, root: Any) -> list[str]:
    """The keys that resemble the `typed` one, of which `key` is the part up to its unknown name.

    These are one that resembles it as a whole, or else up to three whose last part resembles that
    of `key`, the most similar first.
    """
    known = [*_keys(root, ""), *(group for group in groups() if group not in root)]
    if whole := difflib.get_close_matches(typed, known, 1, 0.85):
        return whole
    word = difflib.get_close_matches(_last(key), {_last(k) for k in known}, 1, 0.7)
    return difflib.get_close_matches(key, [k for k in known if _last(k) in word], cutoff=0)


def _keys(node: Any, prefix: str) -> Iterator[str]:
    """The full keys of a configuration, without those of interpolated nodes."""
    for key in _own_keys(node):
        yield prefix + key
        if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
            yield from _keys(node[key], f"{prefix}{key}.")


def _own_keys(node: Any) -> list[str]:
    if not isinstance(node, DictConfig):
        return []
    return [str(key) for key in node if key not in ("_target_", "hydra")]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _lines(error: BaseException) -> list[str]:
    lines = [line.strip() for line in str(error).splitlines()]
    return [line for line in lines if line] or [type(error).__name__]


# The extra that installs each option of these groups.
EXTRAS = {
    "hydra/launcher": {
        "joblib": "joblib",
        "ray": "ray",
        "ray_aws": "ray",
        "submitit_slurm": "slurm",
        "submitit_local": "slurm",
    },
    "hydra/sweeper": {"optuna": "optuna"},
}


def extra(missing: str) -> str | None:
    """Which extra installs a missing file of the configuration, such as `hydra/launcher/ray`.

    Returns a sentence, or None if no extra has such a file.
    """
    for group, options in EXTRAS.items():
        for option, name in options.items():
            # The samplers of a sweeper come with it.
            if missing == f"{group}/{option}" or missing.startswith(f"{group}/sampler/"):
                return f"{group}={option} needs the extra: pip install 'robusttrain[{name}]'"
    return None
