"""Weights that a configured architecture starts with.

Their keys, `initialisation`, `weights`, `weights_key` and `strict`, are in the section `model` of
every architecture, a user's own included, and belong to none (`config/model_section.py`). A
checkpoint of `checkpoint=` brings its model and its configuration along instead.
"""

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.checkpoints import external, pretrained
from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.checkpoints.external import CODE, Fit, StateDict, Weights
from robusttrain.errors import InputError
from robusttrain.models import Architecture, Pretrained
from robusttrain.models.head import head_of, module_of
from robusttrain.models.initialisation import Initialisation

KEY = "model.weights"

# Stands for the weights of the library that an architecture is from.
DEFAULT = "default"

# Names of each kind in a message.
SHOWN = 3


@dataclass(frozen=True)
class InitialWeights:
    """The keys of every model for the weights that it starts with.

    Parameters
    ----------
    weights
        What the network starts with instead of random weights: a state dict (.pt, .safetensors), a
        checkpoint, a run, `pretrained:NAME`, or `default` for the weights of torchvision or timm.
    weights_key
        Which state dict of a file with several is taken, such as model_ema. null: the usual one.
    strict
        Whether every tensor of the file and of the network must have its counterpart, apart from a
        head of other classes. false: what fits is loaded, and the rest is listed.
    initialisation
        The random weights of a new network: `usual`, those that its layers draw for themselves, or
        `ibp`, which keeps the width of interval bounds from layer to layer (Shi et al. 2021).
    """

    weights: str | None = None
    weights_key: str | None = None
    strict: bool = True
    initialisation: Initialisation = Initialisation.usual

    def __post_init__(self) -> None:
        ranges.one_of(list(Initialisation), initialisation=self.initialisation)
        object.__setattr__(self, "initialisation", Initialisation(self.initialisation))

    def unused(self) -> Mapping[str, str]:
        """`initialisation` with weights, and the other keys without them."""
        keys = ("initialisation",) if self.weights is not None else ("weights_key", "strict")
        return dict.fromkeys(keys, "weights")

    def file(self) -> Path | None:
        """The file of the weights; None if there are none, or the library has them.

        Raises
        ------
        InputError
            If there is no such file.
        """
        if self.weights is None or self.weights == DEFAULT:
            return None
        if pretrained.is_named(self.weights):
            return pretrained.located(self.weights, KEY)
        return checkpoints.located(self.weights, KEY)

    def provenance(self) -> dict[str, str | None] | None:
        """The file and its SHA-256, for the manifest; None without weights."""
        file = self.file()
        if file is None:
            return None if self.weights is None else {"path": DEFAULT, "sha256": None}
        return {"path": str(file.absolute()), "sha256": digest_of(file)}

    def read(self, trust: Sequence[str]) -> Checkpoint | Weights | None:
        """The content of the file; None if there is none.

        Raises
        ------
        InputError
            If it is damaged, holds no weights, or is code that is not trusted.
        """
        path = self.file()
        if path is None:
            return None
        kind = external.program_kind(path)
        if kind is not None:
            allowed = "it brings its own network, so give checkpoint=FILE in place of model.weights"
            raise InputError(KEY, self.weights, allowed, f"is a program of {kind}")
        content = _content(path, trust)
        if checkpoints.is_ours(content):
            if self.weights_key is not None:
                problem = "has no effect with a checkpoint of robusttrain, which has one state dict"
                raise InputError("model.weights_key", self.weights_key, problem=problem)
            return checkpoints.parse(content, path, KEY)
        return self._chosen(content, path)

    def default(
        self, architecture: Architecture | nn.Module, image_shape: tuple[int, int, int]
    ) -> Weights:
        """The weights of the library that `architecture` is from.

        Raises
        ------
        InputError
            If it has none, or they cannot be downloaded.
        """
        if not isinstance(architecture, Pretrained):
            allowed = "a file or a run: only model=torchvision and model=timm have default weights"
            raise InputError(KEY, DEFAULT, allowed)
        if self.weights_key is not None:
            problem = f"has no effect with {KEY}={DEFAULT}"
            raise InputError("model.weights_key", self.weights_key, problem=problem)
        return Weights({"": architecture.pretrained(image_shape)})

    def load_into(
        self, model: nn.Module, given: Checkpoint | Weights, num_classes: int, *, trains: bool
    ) -> list[str]:
        """Load `given`, the content of the file, into `model`; returns lines for the user.

        Names may have prefixes of wrappers (`module.`, `_orig_mod.`, `model.`, `backbone.`). A head
        of other classes keeps its new weights.

        Parameters
        ----------
        trains
            Whether the model is trained next. Otherwise a new head is refused.

        Raises
        ------
        InputError
            If the weights do not fit; names and nearest names are in the message.
        """
        states = {"": _tensors(given.model)} if isinstance(given, Checkpoint) else given.states
        matches = {key: _matched(model, state, num_classes) for key, state in states.items()}
        fitting = [key for key, match in matches.items() if not match.misfits]
        taken = fitting[0] if fitting else next(iter(matches))
        match = matches[taken]
        if match.misfits:
            self._refuse_misfit(match)
        if match.replaced and not trains:
            before, now = match.replaced
            problem = f"has a head of {before} classes, and the data set has {now}"
            raise InputError(KEY, self.weights, "a new head has to be trained first", problem)
        model.load_state_dict(match.loaded, strict=False)
        return [*self._lines(model, match, taken, fitting[1:])]

    def _chosen(self, content: object, path: Path) -> Weights:
        """The state dicts of a file of another tool, or the one that `weights_key` names."""
        if self.weights_key is None:
            usual = external.state_dicts(content)
            if usual:
                return Weights(usual, "")
        found = dict(external.nested_states(content))
        there = ", ".join(key or "the file itself" for key in found)
        if self.weights_key is None:
            allowed = f"name one by model.weights_key: {there}" if there else ""
            problem = "has no state dict (tensors by name) at a usual place"
            raise InputError(KEY, path, allowed, problem)
        if self.weights_key not in found:
            near = difflib.get_close_matches(self.weights_key, found, 1)
            hint = f"; near it: {near[0]}" if near else ""
            problem = f"names no state dict of {path}"
            allowed = f"it has {there or 'none'}{hint}"
            raise InputError("model.weights_key", self.weights_key, allowed, problem)
        return Weights({self.weights_key: found[self.weights_key]})

    def _refuse_misfit(self, match: "Match") -> None:
        """Refuse weights that do not fit, unless the user lets what fits be loaded."""
        share = len(match.loaded) / max(1, len(match.loaded) + match.misfits)
        if not match.loaded or (self.strict and share < 0.5):
            problem = "is of another architecture"
            fit = f"{len(match.loaded)} tensors fit by name and shape, {match.misfits} do not"
            raise InputError(KEY, self.weights, f"{fit}: {match.explain()}", problem)
        if self.strict:
            allowed = f"{match.explain()} (model.strict=false loads what fits)"
            raise InputError(KEY, self.weights, allowed, "does not fit the model")

    def _lines(
        self, model: nn.Module, match: "Match", taken: str, others: Sequence[str]
    ) -> Iterator[str]:
        subject = f"{KEY}={self.weights}"
        line = f"{subject}: {len(match.loaded)} tensors"
        if taken:
            line += f", which are under {taken}"
        if others:
            line += f"; {' and '.join(key or 'the file itself' for key in others)} would fit, too"
        yield line + external.normalisation_of(model, external.statistics_in(model), match.fit)
        if match.replaced:
            before, now = match.replaced
            head = ", ".join(match.head)
            yield f"{subject}: the head ({head}) of {before} classes is replaced by one of {now}"
        kinds = {t.dtype for t in match.loaded.values() if t.is_floating_point()}
        kinds -= {weight.dtype for weight in model.parameters()}
        if kinds:
            names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
            yield f"{subject}: weights in {names} are converted to those of the model"
        if match.misfits:
            yield f"{subject}: skipped, as model.strict=false: {match.explain(shown=None)}"


def digest_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class Match(NamedTuple):
    """How weights fit a model.

    Parameters
    ----------
    fit
        The comparison of names.
    loaded
        The tensors that fit, by the names of the model.
    missing, unexpected
        Names of the model that the weights lack, and names of the weights that the model lacks,
        each with the nearest name on the other side, or an empty text.
    reshaped
        A text for each name with two shapes.
    head, replaced
        The modules of a head of other classes, which is not loaded; and its classes, then and now.
    """

    fit: Fit
    loaded: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    head: list[str]
    replaced: tuple[int, int] | None

    @property
    def misfits(self) -> int:
        """How many names do not fit."""
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)

    def explain(self, shown: int | None = SHOWN) -> str:
        """The names that do not fit, up to `shown` of each kind, or all."""
        kinds = {
            "not in the file": _near(self.missing, self.unexpected),
            "not in the model": _near(self.unexpected, self.missing),
            "of another shape": self.reshaped,
        }
        return "; ".join(f"{kind}: {_listed(ns, shown)}" for kind, ns in kinds.items() if ns)


def _matched(model: nn.Module, given: StateDict, num_classes: int) -> Match:
    fit, own = external.best_fit(model, given), model.state_dict()
    different = {n: t for n, t in fit.matched.items() if t.shape != own[n].shape}
    head = {module_of(name) for name in head_of(model, num_classes)}
    of_head = {name for name in different if module_of(name) in head}
    first = next((name for name in different if name in of_head), "")
    is_replaced = bool(first) and all(
        different[name].shape[1:] == own[name].shape[1:] for name in of_head
    )
    left_out = {name for name in own if module_of(name) in head} if is_replaced else set()
    return Match(
        fit=fit,
        loaded={n: t for n, t in fit.matched.items() if n not in {*different, *left_out}},
        missing=fit.missing,
        unexpected=fit.unexpected,
        reshaped=[_shapes(n, t, own[n]) for n, t in different.items() if n not in left_out],
        head=sorted(head) if is_replaced else [],
        replaced=(len(different[first]), num_classes) if is_replaced else None,
    )


def _shapes(name: str, given: Tensor, own: Tensor) -> str:
    there, here = tuple(given.shape), tuple(own.shape)
    text = f"{name} {there} in the file, {here} in the model"
    if given.ndim == own.ndim == 4 and (there[0], *there[2:]) == (here[0], *here[2:]):
        return f"{text} (a layer for {there[1]} channels there, for {here[1]} here)"
    return text


def _near(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """The names, each with the nearest of the `others` behind it, if one is near."""
    found = {name: difflib.get_close_matches(name, others, 1, 0.7) for name in names[:SHOWN]}
    return [f"{name} (near {found[name][0]})" if found.get(name) else name for name in names]


def _listed(names: Sequence[str], shown: int | None) -> str:
    more = 0 if shown is None else len(names) - len(names[:shown])
    return ", ".join(names[:shown]) + (f" and {more} more" if more else "")


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, which may also hold extra state."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _content(path: Path, trust: Sequence[str]) -> Any:
    """What a file holds, with whole modules replaced by their state dicts."""
    try:
        return checkpoints.read(path, KEY)
    except InputError as error:
        # As `kinds.named` says it of a file with an object of some class.
        if "not of tensors alone" not in error.allowed:
            raise
        if CODE not in trust:
            allowed = f"{error.allowed}, or add trust=[{CODE}] if you trust its author"
            raise InputError(KEY, path, allowed, error.problem) from error
    try:
        return _without_modules(torch.load(path, map_location="cpu", weights_only=False))
    # The objects of a pickle may raise anything.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(KEY, path, reason, "cannot be read as a pickle") from error


def _without_modules(content: Any) -> Any:
    if isinstance(content, nn.Module):
        return content.state_dict()
    if isinstance(content, Mapping):
        return {key: _without_modules(value) for key, value in content.items()}
    return content
