"""Which parts of a model a training changes: its parameters, and the statistics of BatchNorm."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from robusttrain.defenses import Defense, Unsupervised
from robusttrain.errors import InputError
from robusttrain.models.blocks import blocks_of, innermost, noise_parameters, plain_name
from robusttrain.models.head import head_of, module_of
from robusttrain.models.modes import AlwaysInEval, modes_restored
from robusttrain.training.settings import LAST, BatchNorm, Training

KEY = "training.trainable"


@contextmanager
def partly_frozen(
    model: nn.Module, settings: Training, num_classes: int, defense: Defense | None = None
) -> Iterator[None]:
    """Freeze in this block what `settings` and `defense` freeze; put everything back afterwards.

    An `Unsupervised` defense freezes the head. Frozen parameters need no gradient. Parameters that
    the model itself has frozen stay so.

    Raises
    ------
    InputError
        If the model has no such parts, or if nothing would be left to train.
    """
    chosen = trainable(model, settings.trainable, num_classes)
    if isinstance(defense, Unsupervised):
        chosen -= set(head_of(model, num_classes))
        if not chosen:
            allowed = "name parameters before the head, which this defense does not train"
            value = described(settings.trainable)
            raise InputError(KEY, value, allowed, "leaves nothing to train")
    frozen = [p for name, p in model.named_parameters() if p.requires_grad and name not in chosen]
    norms = _batch_norms(model) if settings.batch_norm is BatchNorm.frozen else []
    kinds = [type(norm) for norm in norms]
    with modes_restored(model):
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for norm, kind in zip(norms, kinds, strict=True):
                norm.training = False
                norm.__class__ = type(f"Frozen{kind.__name__}", (AlwaysInEval, kind), {})
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            for norm, kind in zip(norms, kinds, strict=True):
                norm.__class__ = kind


def trainable(model: nn.Module, chosen: str | Sequence[str], num_classes: int) -> set[str]:
    """The names of the parameters that a training changes, those of noise included.

    Parameters
    ----------
    model
        The model, with its noise.
    chosen
        `all`, `head`, `last:N`, a pattern, or several of them, as `Training.trainable`.
    num_classes
        Number of its logits.

    Raises
    ------
    InputError
        If a pattern matches nothing, the model has no head or fewer blocks, or nothing is left.
    """
    parameters, of_noise = dict(model.named_parameters()), noise_parameters(model)
    names = {name for name, parameter in parameters.items() if id(parameter) in of_noise}
    for word in [chosen] if isinstance(chosen, str) else chosen:
        names |= set(_chosen_by(word, model, list(parameters), num_classes))
    changing = {name for name in names if parameters[name].requires_grad}
    if not changing:
        allowed = "the model itself has frozen all of these parameters"
        raise InputError(KEY, described(chosen), allowed, "leaves nothing to train")
    return changing


def described(chosen: str | Sequence[str]) -> str:
    """The value of `training.trainable` as it is written on a command line."""
    return chosen if isinstance(chosen, str) else f"[{','.join(chosen)}]"


def summary(model: nn.Module, chosen: str | Sequence[str]) -> str:
    """A line that tells how much of a partly frozen model is trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(size for size, needs_gradient in sizes if needs_gradient)
    total = sum(size for size, _ in sizes)
    return f"training {trained:,} of {total:,} parameters ({described(chosen)})"


def _chosen_by(word: str, model: nn.Module, names: list[str], num_classes: int) -> list[str]:
    """The names of the parameters that a word of `training.trainable` stands for."""
    if word == "all":
        return names
    if word == "head" or LAST.fullmatch(word):
        return _last_blocks(word, model, num_classes)
    of_noise = noise_parameters(model)
    own = [name for name, p in model.named_parameters() if id(p) not in of_noise]
    wrappers = innermost(model, own)[1]
    short = {name: plain_name(name.removeprefix(wrappers)) for name in names}
    found = [name for name in names if fnmatchcase(name, word) or fnmatchcase(short[name], word)]
    if not found:
        allowed = _nearest(word, list(short.values()))
        raise InputError(KEY, word, allowed, "matches no parameter of the model")
    return found


def _last_blocks(word: str, model: nn.Module, num_classes: int) -> list[str]:
    """The parameters of the head, and of N blocks before it if `word` is `last:N`."""
    head, blocks = head_of(model, num_classes), blocks_of(model, num_classes)
    if not head:
        problem = f"needs a head: no weight of the model has {num_classes} outputs"
        raise InputError(KEY, word, "name parameters by a pattern", problem)
    count, before = int(word.partition(":")[2] or 0), len(blocks) - 1
    if count > before:
        allowed = f"last:1 to last:{before}: the model has {before} blocks before its head"
        raise InputError(KEY, word, allowed)
    return [name for block in blocks[before - count :] for name in block]


def _nearest(word: str, names: list[str]) -> str:
    """Some patterns that resemble `word` and match a parameter."""
    modules = dict.fromkeys(f"{place}.*" for place in map(module_of, names) if place)
    known = [*names, *modules]
    near = difflib.get_close_matches(word, ["all", "head", *known], 3, 0.6) or known[:3]
    return f"nearest are {', '.join(near)}"


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers of `model` that have running statistics.

    Raises
    ------
    InputError
        If there are none.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        problem = "has no effect on a model without BatchNorm"
        raise InputError("training.batch_norm", "frozen", problem=problem)
    return norms
