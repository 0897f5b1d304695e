"""Messages for expected errors, in at most two lines where Hydra and OmegaConf print many."""

import difflib
import re
import shlex
from collections.abc import Iterable, Iterator
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
        return f"{error.override} cannot be parsed as key=value: {_in_quotes(str(error.override))}"
    if isinstance(error, MissingConfigException):
        return _missing(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing: add {error.full_key}=... to the command line"
    if isinstance(error, InterpolationResolutionError) and error.parent_node is not None:
        return _unresolved(error)
    return None


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
    allowed = f"it must be one of {', '.join(error.options)}"
    return extra(file) or f"{group}={option} is not allowed: {allowed}"


def _wrong_value(error: BaseException, cause: OmegaConfBaseException) -> str:
    """The message for a value of the wrong type."""
    override = str(error).partition("Error merging override ")[2]
    line = _lines(error)[0].removesuffix(":")
    place = f"{override} is not allowed" if override else f"{line}: {cause.full_key}"
    return f"{place}: {_lines(cause)[0]}"


def _unknown_key(error: BaseException, cause: OmegaConfBaseException) -> str:
    """The message for an unknown key: similar keys, and all keys next to it."""
    key = str(cause.full_key)
    override = str(error).partition("config use +")[2]
    parent = cause.parent_node
    assert isinstance(parent, Container)
    near = [renames.KEYS[key]] if key in renames.KEYS else _near(key, parent._get_root())
    hint = f", did you mean {' or '.join(near)}?" if near else ""
    where = key.rpartition(".")[0] or "the top level"
    there = ", ".join(_own_keys(parent)) or "none"
    file = _IN_FILE.match(str(error))
    word = override or (f"{file[0]}{key}" if file else key)
    return f"{word} is not allowed: no such key{hint}\nKeys of {where}: {there}"


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
    near = difflib.get_close_matches(last, there := list(there), 1, 0.7)
    hint = f", did you mean {where}.{near[0]}?" if near else ""
    problem = f"is not allowed: no such key{hint}\nKeys of {where}: {', '.join(there) or 'none'}"
    return InputError(word, problem=problem)


def wrong_type(word: str, error: OmegaConfBaseException) -> InputError:
    """The refusal of a `word` of the command line whose value has another type than its key."""
    return InputError(word, problem=f"is not allowed: {_lines(error)[0]}")


def _near(key: str, root: Any) -> list[str]:
    """Up to three keys whose last part resembles that of `key`, the most similar first."""
    known = list(_keys(root, ""))
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
