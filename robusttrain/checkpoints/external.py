"""Models from other tools: a state dict for a known architecture, or a whole program.

A state dict is always read as data, with `weights_only=True`. TorchScript files and programs of
torch.export are code, so loading one runs its author's code. A program is loaded only if the user
names its file, and consents with `trust=[code]`. In a run directory only checkpoints are read.
"""

import json
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.checkpoints import onnx_programs, pretrained
from robusttrain.checkpoints.about import ABOUT, BYTES, INPUT
from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.errors import InputError
from robusttrain.models.normalize import Normalize

# Keys under which training scripts save the state dict.
USUAL_KEYS = ("state_dict", "model_state_dict", "model", "net")

# Keys of weights that were averaged in training, which are taken if there are no others.
AVERAGED_KEYS = ("model_ema", "state_dict_ema", "ema", "ema_state_dict")

# What wrappers put before the names of the network in them.
WRAPPERS = ("module", "_orig_mod", "model", "backbone")

# A key that Lightning adds.
LIGHTNING = "pytorch-lightning_version"

StateDict = Mapping[str, Tensor]

# The names of tensors, by what is left of them without wrappers.
Names = dict[str, str]

# No batch in memory has this many images, so a limit of at least this size counts as none.
UNLIMITED = 2**31

# What the user trusts who lets programs run their code.
CODE = "code"

DYNAMIC = "dynamic_shapes=({0: torch.export.Dim('batch')},)"


class Kind(StrEnum):
    """The tool that wrote a program."""

    torchscript = "TorchScript"
    exported = "torch.export"
    onnx = "ONNX"


@dataclass(frozen=True)
class Weights:
    """The state dicts of a file, for an architecture that the user chooses.

    Parameters
    ----------
    states
        Each state dict by its key in the file, empty for the file itself; preferred ones first.
    tool
        The tool that wrote the file, if it is known.
    """

    states: Mapping[str, StateDict]
    tool: str = ""

    def load_into(self, model: nn.Module, path: Path | str) -> str:
        """Load the first state dict that fits `model`; returns a line for the user about it.

        Names may have a common prefix, as left by DataParallel (`module.`), compiled models
        (`_orig_mod.`) and wrapper modules. If only the statistics of `Normalize` layers are
        missing, the state dict is that of the network behind the normalisation.

        Raises
        ------
        InputError
            If names or shapes differ from those of the model; `path` is only for the message.
        """
        fits = {key: best_fit(model, tensors) for key, tensors in self.states.items()}
        fitting = [key for key, fit in fits.items() if not fit.misfits()]
        if not fitting:
            problem, first = "does not fit the model", next(iter(fits))
            reason = self._excess(model, self.states[first]) or fits[first].explain()
            raise InputError("checkpoint", path, reason, problem)
        taken, *others = fitting
        fit, statistics = fits[taken], statistics_in(model)
        model.load_state_dict(fit.matched, strict=False)
        line = f"checkpoint={path} is a state dict of {len(self.states[taken])} tensors"
        if others:
            line += f", which are under {taken}; {' and '.join(others)} would fit, too"
        elif taken != next(iter(fits)):
            line += f", which are under {taken}; {next(iter(fits))} does not fit"
        return line + normalisation_of(model, statistics, fit)

    def _excess(self, model: nn.Module, tensors: StateDict) -> str:
        """Which tensors are too many, if those under one prefix fit `model` without the others."""
        for prefix in dict.fromkeys(name.partition(".")[0] for name in tensors):
            part = {n: t for n, t in tensors.items() if n.startswith(f"{prefix}.")}
            beside = [name for name in tensors if name not in part]
            if part and beside and not best_fit(model, part).misfits():
                averaged = "n_averaged" in beside
                tool = "AveragedModel of torch.optim.swa_utils" if averaged else self.tool
                wrote = f"it is of {tool}: " if tool else ""
                return (
                    f"{wrote}{prefix}.* fits, but {len(beside)} tensors (first {beside[0]}) are "
                    f"beside it; save the state dict of that part alone"
                )
        return ""


@dataclass(frozen=True)
class ExportedProgram:
    """A network with its code, used in place of an architecture."""

    path: Path
    kind: Kind
    key: str = "checkpoint"

    def __str__(self) -> str:
        return f"{self.key}={self.path}"

    @property
    def name(self) -> str:
        """Its name in reports: the name of the file without extension."""
        return self.path.stem

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """The loaded program, whatever the data set is."""
        return self.loaded()

    def loaded(self) -> nn.Module:
        """Load the program to the CPU, which runs its code.

        Raises
        ------
        InputError
            If it cannot be loaded, or was exported for certain batch sizes only.
        """
        try:
            # Hide deprecation warnings about the file's format.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _LOADERS[self.kind](self.path)
        except InputError:
            raise
        # The reader of a damaged program may raise any error.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            problem = f"cannot be loaded as a program of {self.kind}"
            raise InputError(str(self), allowed=reason, problem=problem) from error


ExternalModel = Weights | ExportedProgram


def load(
    path: Path | str, trust: Sequence[str] = (), key: str = "checkpoint"
) -> Checkpoint | ExternalModel:
    """Read the file that the user names as `key`; a program is recognised, but not loaded.

    `pretrained:NAME` is a model that comes with the package.

    Raises
    ------
    InputError
        If the file is missing, damaged, or none of these kinds; or if it is a program, and `trust`
        does not contain `CODE`.
    """
    if pretrained.is_named(path):
        path = pretrained.located(path, key)
    in_run = Path(path).is_dir()
    path = checkpoints.located(path, key)
    kind = program_kind(path)
    if in_run and kind is not None:
        allowed = f"to trust its author, name the file itself, with trust=[{CODE}]"
        raise InputError(key, path, allowed, f"is a program of {kind}, and no checkpoint")
    if kind is not None:
        # A graph of ONNX names operations, and has no code.
        if kind is not Kind.onnx and CODE not in trust:
            allowed = f"if you trust its author, add trust=[{CODE}]"
            raise InputError(key, path, allowed, f"is a program of {kind}, which runs its own code")
        return ExportedProgram(path, kind, key)
    content = checkpoints.read(path, key)
    if checkpoints.is_ours(content):
        return checkpoints.parse(content, path, key)
    states = state_dicts(content)
    if not states:
        places = ", ".join(USUAL_KEYS)
        problem = (
            f"is neither a checkpoint of robusttrain, nor a state dict (tensors by name, alone or "
            f"under one of {places}), nor a program (TorchScript, torch.export)"
        )
        raise InputError(key, path, problem=problem)
    return Weights(states, "Lightning" if LIGHTNING in content else "")


class _Loaded(nn.Module):
    """A program as a module whose mode can be set, even if the program has no modes."""

    # `_Exported` rebuilds its weights, so that noise on them would be lost.
    opaque_to_noise = "a program"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits


class _Exported(_Loaded):
    """A program of torch.export, which always computes in the mode that it was exported in."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__(program.module())
        self._program = program

    def train(self, mode: bool = True) -> "_Exported":
        # The module of an exported program raises if its mode is set.
        self.training = mode
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "_Exported":
        from torch.export.passes import move_to_device_pass

        # `fn` does not reach constants and the devices of new tensors, which are in the code.
        self._program = move_to_device_pass(self._program, fn(torch.empty(0)).device)
        self.network = self._program.module()
        return self


def _load_torchscript(path: Path) -> nn.Module:
    checkpoints.check_sums(path)
    about = {ABOUT: b"{}"}
    program = torch.jit.load(path, map_location="cpu", _extra_files=about)  # type: ignore[no-untyped-call]
    # A program of another tool has no such text, which torch leaves empty.
    if BYTES in json.loads(about[ABOUT] or "{}").get(INPUT, ""):
        raise _takes_bytes(path)
    return _Loaded(program)


def _load_exported(path: Path) -> nn.Module:
    checkpoints.check_sums(path)
    # A file object, since torch expects a path to end in .pt2.
    with path.open("rb") as file:
        program = torch.export.load(file)
    inputs = len(program.graph_signature.user_inputs)
    if inputs != 1:
        raise InputError("checkpoint", path, "it must take images alone", f"takes {inputs} inputs")
    if not _images_of(program).dtype.is_floating_point:
        raise _takes_bytes(path)
    limits = _batch_limits(program)
    if limits is not None:
        allowed = f"export it with a dynamic batch dimension, {DYNAMIC}"
        raise InputError("checkpoint", path, allowed, f"takes {limits} images at a time")
    return _Exported(program).to("cpu")


def _load_onnx(path: Path) -> nn.Module:
    return _Loaded(onnx_programs.load(path))


_LOADERS = {
    Kind.torchscript: _load_torchscript,
    Kind.exported: _load_exported,
    Kind.onnx: _load_onnx,
}


def _batch_limits(program: torch.export.ExportedProgram) -> str | None:
    """The batch sizes that an exported program accepts, as text; None if it accepts all."""
    size = str(_images_of(program).shape[0])
    ranges = {str(symbol): limits for symbol, limits in program.range_constraints.items()}
    # A symbol allows all sizes in its range. A number, or an expression such as 2*s0, does not.
    if not size.isidentifier():
        return f"only {size}"
    low, high = ranges[size].lower, ranges[size].upper
    # torch.export treats 0 and 1 as special and may exclude them from the range, but they work.
    return None if low <= 2 and high >= UNLIMITED else f"only {low} to {high}"


def _images_of(program: torch.export.ExportedProgram) -> Tensor:
    """The images that an exported program takes, without values."""
    first = program.graph_signature.user_inputs[0]
    images: Tensor = next(n for n in program.graph.nodes if n.name == first).meta["val"]
    return images


def _takes_bytes(path: Path) -> InputError:
    allowed = "it must take floats in [0, 1], which have gradients: export it without --uint8"
    return InputError("checkpoint", path, allowed, "takes images as bytes")


def program_kind(path: Path) -> Kind | None:
    """The tool that wrote the program in a file; None if it is no program."""
    if path.suffix == ".onnx":
        return Kind.onnx
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    # Not an archive, or one with a damaged list of names, which the next reader reports.
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError):
        return None
    if "constants.pkl" in names:
        return Kind.torchscript
    if names & {"archive_format", "serialized_exported_program.json"}:
        return Kind.exported
    return None


def state_dicts(content: object) -> dict[str, StateDict]:
    """The state dicts in the content of a file; none if there is none at a usual place."""
    found = dict(nested_states(content))
    usual = [key for key in ("", *USUAL_KEYS, *AVERAGED_KEYS) if key in found]
    return {key: found[key] for key in dict.fromkeys([*usual, *found])} if usual else {}


def nested_states(content: object, key: str = "") -> Iterator[tuple[str, StateDict]]:
    """(key, state dict) of all state dicts in nested dicts; a key has a dot between levels."""
    if not isinstance(content, Mapping):
        return
    if content and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in content.items()):
        yield key, content
    for name, value in content.items():
        yield from nested_states(value, f"{key}.{name}".lstrip("."))


def statistics_in(model: nn.Module) -> list[str]:
    """The keys of the buffers of `Normalize` layers in the state dict of `model`."""
    layers = (name for name, module in model.named_modules() if isinstance(module, Normalize))
    return [f"{layer}.{key}".lstrip(".") for layer in layers for key in ("mean", "std")]


def normalisation_of(model: nn.Module, statistics: Sequence[str], fit: "Fit") -> str:
    """The end of a line that says what `model` normalises with, and where that is from."""
    if not statistics:
        return ""
    source = "the file" if statistics[0] in fit.matched else "the configuration"
    used = model.state_dict()
    values = (f"{name.rpartition('.')[2]} {_rounded(used[name])}" for name in statistics)
    return f"; the model normalises with the values of {source}: {', '.join(values)}"


class Fit(NamedTuple):
    """How a state dict fits a model: tensors by the model's names, and names that do not fit."""

    matched: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]

    def misfits(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)

    def explain(self) -> str:
        counted = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.reshaped,
        }
        phrases = (
            f"{len(names)} {what} (first {names[0]})" for what, names in counted.items() if names
        )
        return "keys: " + ", ".join(phrases)


def best_fit(model: nn.Module, given: StateDict) -> Fit:
    """How a state dict fits `model` best, whatever wraps either of them."""
    own, statistics = model.state_dict(), statistics_in(model)
    network = {name: tensor for name, tensor in own.items() if name not in statistics}
    # The whole model and plain names come first, and are chosen if others fit no better.
    fits = (
        _fit(target, given, ours(target), theirs(given))
        for theirs in (_by_inner_name, _by_unwrapped_name)
        for ours in (_by_inner_name, _by_unwrapped_name)
        for target in (own, network)
    )
    return min(fits, key=Fit.misfits)


def _fit(own: StateDict, given: StateDict, ours: Names, theirs: Names) -> Fit:
    both = [name for name in ours if name in theirs]
    shapes = {
        name: (tuple(given[theirs[name]].shape), tuple(own[ours[name]].shape)) for name in both
    }
    return Fit(
        matched={ours[name]: given[theirs[name]] for name in both},
        # Old files have no counters of BatchNorm, which it does not need.
        missing=[
            ours[n] for n in ours if n not in theirs and not n.endswith("num_batches_tracked")
        ],
        unexpected=[theirs[name] for name in theirs if name not in ours],
        reshaped=[
            f"{theirs[name]}: {there} in the checkpoint, {here} in the model"
            for name, (there, here) in shapes.items()
            if there != here
        ],
    )


def _by_inner_name(tensors: StateDict) -> Names:
    """The names, by their rest without the prefix that all of them share."""
    paths = [name.split(".") for name in tensors]
    shared = 0
    while all(len(path) > shared + 1 for path in paths) and len({p[shared] for p in paths}) == 1:
        shared += 1
    return {".".join(path[shared:]): name for path, name in zip(paths, tensors, strict=True)}


def _by_unwrapped_name(tensors: StateDict) -> Names:
    """The same, with no wrapper before any of the names; a head may be beside what is wrapped."""
    names = _by_inner_name(tensors)
    unwrapped = {_unwrapped(inner): name for inner, name in names.items()}
    return unwrapped if len(unwrapped) == len(names) else names


def _unwrapped(name: str) -> str:
    first, _, rest = name.partition(".")
    return _unwrapped(rest) if first in WRAPPERS and rest else name


def _rounded(statistic: Tensor) -> list[float]:
    return [round(float(value), 4) for value in statistic.flatten()]
