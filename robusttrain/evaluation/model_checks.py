"""Checks of a model and its images before any attack.

A check leaves mode, noise streams and torch's global random stream on the CPU as they were.
Images are floats (N, C, H, W) in [0, 1], labels are integers (N,).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robusttrain import seeding
from robusttrain.attacks.model_view import frozen, predictions
from robusttrain.data import Mapped, Samples, Split, Streamed, as_input
from robusttrain.errors import InputError
from robusttrain.evaluation.randomness import apart, repeated
from robusttrain.models.modes import modes_restored
from robusttrain.models.normalize import Normalize
from robusttrain.noise.control import drawing_from
from robusttrain.noise.layer import predicts_randomly
from robusttrain.runtime import free_memory

# Enough to see that one way to normalise is better than another.
IMAGES = 500

# Bytes of an evaluation for each pixel value: in the image, the attacked one, the worst one so far
# and what is computed from them, all of them floats.
EVALUATED = 16

# Images in a pass; and how many of them are looked at without the others too.
BATCH, ALONE = 32, 8

# What batches of other sizes, or a sum to 1, may differ by through rounding, on any device.
ROUNDING = 1e-2

# Odds of a gain in accuracy by luck below which another normalisation is clearly better.
LUCK = 1e-3

# (mean, std) in pixel units that published models are used with, beside those of their own data.
Statistics = tuple[list[float], list[float]]
IMAGENET: Statistics = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
RANGES: dict[str, Statistics] = {
    "the range [-1, 1]": ([0.5], [0.5]),
    "the range [0, 255]": ([0.0], [1 / 255]),
}


@dataclass(frozen=True)
class Finding:
    """What a check saw.

    Parameters
    ----------
    name
        The check.
    figure
        What it measured, as the check defines it.
    message
        What to tell the user, in one line; empty where all is well.
    note
        What the user should know even where all is well; empty if there is no such thing.
    """

    name: str
    figure: float
    message: str
    note: str = ""


def refuse_outside_box(samples: Samples, dataset: str) -> None:
    """Raise `InputError`, naming `dataset`, unless the images are pixels.

    Those are bytes from 0 to 255, also in another type of integers, or floats in [0, 1]. Integers
    that never exceed 1 are refused, as they would become 255 times darker.
    """
    # What files are decoded to are bytes, and arrays in files are checked when they are opened.
    if not isinstance(samples, Split) or samples.images.dtype == torch.uint8:
        return
    images = samples.images
    low, high = float(images.min()), float(images.max())
    is_float = images.is_floating_point()
    if not (low >= 0 and (high <= 1 if is_float else 1 < high <= 255)):
        allowed = "they must be bytes from 0 to 255, or floats in [0, 1]"
        problem = f"has images with values from {low:.4g} to {high:.4g}"
        raise InputError("dataset", dataset, allowed, problem)


def refuse_too_many(samples: Samples, rows: Tensor, device: torch.device) -> None:
    """Raise `InputError` if images that stay in files would not fit in memory to be evaluated.

    The chosen ones are there as floats, with what attacks make of them.
    """
    if not isinstance(samples, Streamed | Mapped):
        return
    size = samples.take(rows).decoded_bytes * EVALUATED
    if not free_memory.fits(size, device, share=1):
        problem = (
            f"images would take {size / 1e9:.3g} GB while they are evaluated, more than is free"
        )
        raise InputError("evaluation.samples", len(rows), "give a smaller number", problem)


def refuse_without_gradient(model: nn.Module, x: Tensor, name: str) -> None:
    """Raise `InputError`, naming the model, if its outputs have no gradient at the images."""
    with _looking(model), frozen(model), torch.enable_grad():
        logits = _outputs(model, x[:1].clone().requires_grad_())
    if not logits.requires_grad:
        problem = "passes no gradient to its images (torch.no_grad, detach or integers inside)"
        raise InputError("model", name, "attacks that follow gradients cannot see it", problem)


def sample(samples: Samples, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Up to `IMAGES` images of those at `rows` of `samples`, and their labels."""
    order = torch.randperm(len(rows), generator=seeding.generator_for(0, "inspected images"))
    images, labels = samples.take(rows[order[:IMAGES]]).loaded()
    return as_input(images), labels


def inspect(model: nn.Module, x: Tensor, y: Tensor, *, foreign: bool) -> list[Finding]:
    """All checks of a model that may have been trained by others (`foreign`) or here.

    It costs a forward pass an image, and for a foreign model four to six more; no more than
    `IMAGES` images are needed.
    """
    findings = [softmax_outputs(model, x), train_mode(model, x)]
    if foreign:
        findings.append(normalisation(model, x, y))
    return findings


def softmax_outputs(model: nn.Module, x: Tensor) -> Finding:
    """Whether the outputs are probabilities; the figure is the share of rows that could be some."""
    with _looking(model):
        outputs = _outputs(model, x)
    sums_to_1 = (outputs.sum(1) - 1).abs() < ROUNDING
    share = float((sums_to_1 & (outputs >= 0).all(1)).float().mean())
    message = (
        "the outputs are probabilities (no entry is negative, each row sums to 1), not logits: "
        "gradients saturate where the model is sure, which makes attacks too weak, "
        "and margins are not those of logits: leave out the softmax"
    )
    return Finding("softmax outputs", share, message if share == 1 else "")


def train_mode(model: nn.Module, x: Tensor) -> Finding:
    """Whether layers behave as in training although the model is in eval mode.

    The figure is the largest difference between two outputs for the same image, as a share of the
    spread of the outputs, and 0 where that may be rounding (`apart`): between passes, where it
    shows dropout, and between a small batch and a larger one, where it shows BatchNorm with the
    statistics of the batch. Noise of a `NoiseLayer` is drawn the same for both, and where it takes
    part in predictions batches are not compared.
    """
    x = x[:BATCH]
    with _looking(model):
        among, by_chance = repeated(model, x)
        alone = among[:ALONE] if predicts_randomly(model) else _outputs(model, x[:ALONE])
    by_company = apart(model, among[:ALONE], alone, ROUNDING)
    if by_chance:
        message = (
            f"two passes over the same images differ by {by_chance:.1%} of the spread of the "
            "outputs, although no noise= takes part: dropout is active, as in train mode, or the "
            "model draws random numbers of its own; export the model in eval mode"
        )
    elif by_company:
        message = (
            f"outputs for an image change with the other images of its batch, by {by_company:.1%} "
            "of their spread: BatchNorm uses the statistics of the batch, as in train mode; "
            "export the model in eval mode"
        )
    else:
        message = ""
    return Finding("train mode", max(by_chance, by_company), message)


def normalisation(model: nn.Module, x: Tensor, y: Tensor) -> Finding:
    """Whether the model was trained on images normalised otherwise than it normalises itself.

    It classifies the images as they are, and (x - mean) / std with the statistics of the images
    and those that are in common use; for a model with a `Normalize` layer in the place of what that
    computes. The figure is the largest gain in accuracy. It is a warning where an exact sign test
    over the images that one of both gets right puts it down to luck with less than `LUCK`. Few
    images cannot show that, so that a note always has what was assumed, and the best alternative.
    """
    inner = next((module for module in model.modules() if isinstance(module, Normalize)), None)
    candidates = _candidates(x, inner)
    with _looking(model):
        right = predictions(_outputs(model, x)) == y
        hits = {
            name: predictions(_outputs(model, _seen_as(x, statistics, inner))) == y
            for name, statistics in candidates.items()
        }
    best = max(hits, key=lambda name: int(hits[name].sum()))
    before, after = float(right.float().mean()), float(hits[best].float().mean())
    odds = _odds(int((hits[best] & ~right).sum()), int((right & ~hits[best]).sum()))
    mean, std = ([round(value, 4) for value in values] for values in candidates[best])
    alternative = f"{after:.1%} on (x - mean) / std with mean={mean} std={std} ({best})"
    now = "on images in [0, 1]" if inner is None else "as the model normalises"
    message = f"clean accuracy is {before:.1%} {now}, but {alternative}: {_advice(inner)}"
    assumed = "" if inner is None else ", which it normalises itself"
    note = (
        f"the model is assumed to take images in [0, 1]{assumed}: clean accuracy is {before:.1%} "
        f"of {len(y)} images, and would be {alternative}"
    )
    return Finding("normalisation", after - before, message if odds < LUCK else "", note)


@contextmanager
def _looking(model: nn.Module) -> Iterator[None]:
    with torch.no_grad(), modes_restored(model), torch.random.fork_rng(devices=[]):
        model.eval()
        yield


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    """One pass over all images, with the same draws of declared noise each time."""
    with drawing_from(model, 0):
        return torch.cat([model(part) for part in torch.split(x, BATCH)])


def _candidates(x: Tensor, inner: Normalize | None) -> dict[str, Statistics]:
    """Ways to normalise the images, by what they are called."""
    std, mean = torch.std_mean(x, (0, 2, 3))
    # A channel that never changes cannot be scaled.
    own = {"statistics of these images": (mean.tolist(), std.clamp_min(1 / 255).tolist())}
    imagenet = {"statistics of ImageNet": IMAGENET} if x.shape[1] == 3 else {}
    none = {"no normalisation": ([0.0], [1.0])} if inner else {}
    return own | imagenet | RANGES | none


def _seen_as(x: Tensor, statistics: Statistics, inner: Normalize | None) -> Tensor:
    """Images whose normalised form is (x - mean) / std behind the model's own normalisation."""
    mean, std = (_channels(values, x) for values in statistics)
    normalised = (x - mean) / std
    return normalised if inner is None else normalised * inner.std + inner.mean


def _advice(inner: Normalize | None) -> str:
    if inner is not None:
        return "give these as model.mean and model.std"
    return "wrap it: the normalisation must be a layer of the model so that eps means pixels"


def _channels(values: list[float], x: Tensor) -> Tensor:
    return torch.tensor(values, dtype=x.dtype, device=x.device)[:, None, None]


def _odds(wins: int, losses: int) -> float:
    """P(wins or more) where each of wins + losses is as likely the one as the other."""
    # Imported here, since it takes as long as a small run, like all of SciPy.
    from scipy.special import bdtrc

    return float(bdtrc(wins - 1, wins + losses, 0.5)) if wins else 1.0
