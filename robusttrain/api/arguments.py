"""Translate the command line that the user typed into arguments for Hydra."""

import re
import sys
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from robusttrain import renames
from robusttrain.config.error_messages import no_such_key
from robusttrain.config.folders import CONF
from robusttrain.config.schema import GROUPS
from robusttrain.errors import InputError
from robusttrain.runtime import distributed

# The option that estimates the cost of a run, and those that start a sweep.
DRY_RUN, SWEEPS = "--dry-run", {"-m", "--multirun"}

# The prefix of keys that belong to a sweep and not to its jobs, and these keys.
SWEEP, OF_SWEEP = "sweep.", ("baseline", "accuracies")


def arguments(given: Sequence[str]) -> list[str]:
    """The arguments for Hydra that stand for those that the user typed.

    Raises
    ------
    InputError
        If `resume=` names no run that can be resumed, a group is given no option, a sweep is
        started under torchrun, a dry run is one of a sweep or of an interrupted run, or a key of
        sweeps is given to a single run.
    """
    if DRY_RUN in given:
        given = _without_dry_run(given)
    arguments = _renamed([word for a in given for word in unstacked(a)])
    arguments = [_of_sweep(argument, arguments) for argument in arguments]
    for argument in arguments:
        _refuse_no_option(argument)
    arguments = _inherited(arguments)
    if distributed.size() > 1 and SWEEPS & set(arguments):
        problem = "is not allowed under torchrun, whose processes share one run"
        allowed = "start the jobs one by one, or without torchrun"
        raise InputError("-m", allowed=allowed, problem=problem)
    return _overrides_last(_resumed(arguments))


def _resumed(arguments: list[str]) -> list[str]:
    """`arguments`, or those of the run that their `resume=` names."""
    if not any(argument.startswith("resume=") for argument in arguments):
        return arguments
    # Imported here, since it takes as long as torch.
    from robusttrain.runs.resume import resumed

    return resumed(arguments)


def _without_dry_run(given: Sequence[str]) -> list[str]:
    words = [word for word in given if word != DRY_RUN]
    refused = [word for word in words if word in SWEEPS or word.startswith("resume=")]
    if refused:
        problem = f"does not go together with {refused[0]}"
        raise InputError(DRY_RUN, allowed="give the command of one new run", problem=problem)
    return words


def _renamed(arguments: list[str]) -> list[str]:
    """`arguments` with current keys; prints a line for each key that has a new name."""
    current = [renames.override(argument) for argument in arguments]
    for old, new in zip(arguments, current, strict=True):
        if old != new:
            # Not to stdout, which may be the configuration that `--cfg` prints.
            print(f"warning: {old} is now spelt {new}", file=sys.stderr, flush=True)
    return current


def _of_sweep(argument: str, arguments: Sequence[str]) -> str:
    """`sweep.KEY=VALUE` as Hydra takes it, with the value as text; other arguments as they are."""
    key, _, value = argument.partition("=")
    if not key.startswith(SWEEP):
        return argument
    name = key.removeprefix(SWEEP)
    if name not in OF_SWEEP:
        raise no_such_key(argument, key, OF_SWEEP)
    if not SWEEPS & set(arguments):
        raise InputError(argument, allowed="start a sweep with -m", problem="is a key of sweeps")
    # Imported here, since it takes as long as torch.
    from robusttrain.runs.resume import quoted

    text = value if value[:1] in ("'", '"') else quoted(value)
    return f"hydra.callbacks.sweeps.{name}={text}"


def _inherited(arguments: list[str]) -> list[str]:
    """Let Hydra accept keys of components whose option may come from a checkpoint.

    Hydra knows the default options only. `robusttrain.runs.inherit` checks these keys later.
    """
    if not any(argument.startswith("checkpoint=") for argument in arguments):
        return arguments
    # Imported here, since it takes as long as torch.
    from robusttrain.runs.inherit import FORCED, INHERITED, OF_TRAINING

    groups = {*INHERITED, *OF_TRAINING} - {argument.partition("=")[0] for argument in arguments}
    return [
        f"{FORCED}{argument}" if _component(argument) in groups else argument
        for argument in arguments
    ]


def _component(argument: str) -> str:
    """The component in which an argument sets a key; empty if it sets something else."""
    section, dot, _ = argument.partition("=")[0].partition(".")
    return section if dot else ""


def _refuse_no_option(argument: str) -> None:
    """Refuse `GROUP=VALUE` where the value cannot be the name of an option, such as null."""
    key, _, value = argument.lstrip("+").partition("=")
    group = key.partition("@")[0]
    if not value or not ((CONF / group).is_dir() or group.startswith("hydra/")):
        return
    try:
        parsed = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        # Hydra will report it.
        return
    # Only experiments can be several at once.
    is_list = isinstance(parsed, list) and group in GROUPS
    if parsed is None or isinstance(parsed, int | float) or is_list:
        options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        raise InputError(key, value, f"one of {', '.join(options)}" if options else "an option")


def unstacked(argument: str) -> list[str]:
    """Expand `noise=[a,b]` into overrides that stack mechanisms a and b; keep other arguments."""
    stacked = re.fullmatch(r"noise=\[([\w,\s]*)\]", argument)
    if stacked is None:
        return [argument]
    options = [option.strip() for option in stacked[1].split(",") if option.strip()]
    # Each mechanism needs a unique name, so a repeated option gets a number.
    names = [
        option if option not in options[:place] else f"{option}_{place}"
        for place, option in enumerate(options)
    ]
    mechanisms = zip(names, options, strict=True)
    return ["noise=stack", *(f"+noise@noise.mechanisms.{name}={o}" for name, o in mechanisms)]


def _overrides_last(arguments: list[str]) -> list[str]:
    """Move overrides behind options: users mix them, and Hydra's argparse rejects the mixture."""
    return sorted(
        arguments, key=lambda a: not a.startswith("-") and ("=" in a or a.startswith("~"))
    )
