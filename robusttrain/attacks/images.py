"""Images that callers give to an attack: floats in [0, 1]."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from robusttrain.errors import InputError

FORMATS = (torch.float32, torch.float64)

# What undoing a normalisation may leave outside of the box by rounding.
TOLERANCE = 1e-6

_valid = ContextVar("images are valid", default=False)


@contextmanager
def images_are_valid() -> Iterator[None]:
    """Attacks in this block get images that need no check, which makes the host wait for a GPU."""
    before = _valid.set(True)
    try:
        yield
    finally:
        _valid.reset(before)


def check_images(x: Tensor) -> None:
    """Raise `InputError` unless `x` has images (N, C, H, W) as float32 or float64 in [0, 1].

    Perturbed images are cut with the box, so that others would change by more than the radius.
    """
    if _valid.get():
        return
    if x.dtype not in FORMATS:
        allowed = "images must be float32 or float64 in [0, 1]; of bytes, x.float() / 255"
        raise InputError("x", allowed=allowed, problem=f"has dtype {x.dtype}")
    if x.numel() == 0:
        return
    low, high = torch.stack(x.aminmax()).tolist()
    # Of NaN neither is true.
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        allowed = "images must be in [0, 1]; a model that needs normalised ones normalises them"
        raise InputError("x", allowed=allowed, problem=f"has values from {low:.4g} to {high:.4g}")
