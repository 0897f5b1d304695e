"""Write a file, run it, and keep it if it computes what the network does."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robusttrain.errors import InputError
from robusttrain.export import Format, Runner
from robusttrain.export.onnx import ONNX
from robusttrain.export.programs import TorchExport, TorchScript
from robusttrain.export.weights import SafeTensors
from robusttrain.report.files import whole

FORMATS: Mapping[str, Format] = {
    "onnx": ONNX(),
    "torchscript": TorchScript(),
    "torch_export": TorchExport(),
    "safetensors": SafeTensors(),
}

# Images in the batch that a program is made from; the check uses other numbers.
EXAMPLES = 2

# How far logits may differ, relative to the largest one: float32 sums in another order.
TOLERANCE = 1e-3


class Agreement(NamedTuple):
    """How a file and its network agree.

    Parameters
    ----------
    images
        The number of images that both have classified, one alone and the others in one batch.
    difference
        The largest difference of two logits.
    """

    images: int
    difference: float


class FromBytes(nn.Module):
    """A network for images as bytes from 0 to 255, as files have them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.to(torch.float32) / 255)
        return logits


def write_checked(
    network: nn.Module, images: Tensor, path: Path, format: Format, about: Mapping[str, str]
) -> Agreement:
    """Write `network` as `path`, unless the file computes something else.

    Parameters
    ----------
    network
        The network in eval mode, on the CPU.
    images
        Images (N, C, H, W) of its data, of the type that the file will take.
    path
        The file.
    format
        Its format.
    about
        The metadata of the file.

    Raises
    ------
    InputError
        If a package is missing, the network cannot be written in this format, or the file does not
        give the same predictions. No file is left then.
    """
    refuse_missing(format)
    with whole(path) as temporary:
        try:
            format.write(network, images[:EXAMPLES], temporary, about)
            runner = format.opened(temporary, network)
            return compared(network, runner, images)
        except InputError as error:
            raise InputError(str(path), allowed=str(error), problem="was not written") from error
        # Exporters raise errors of any type for what they do not know.
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(str(path), allowed=reason, problem="cannot be written") from error


def refuse_missing(format: Format) -> None:
    """Raise `InputError` if a package of the format is not installed."""
    missing = [name for name in format.packages if importlib.util.find_spec(name) is None]
    if missing:
        extra = format.suffix.removeprefix(".")
        allowed = f"pip install 'robusttrain[{extra}]'"
        raise InputError(f"--to {extra}", allowed=allowed, problem=f"needs {', '.join(missing)}")


@torch.no_grad()
def compared(network: nn.Module, runner: Runner, images: Tensor) -> Agreement:
    """How `runner` agrees with `network` on `images`, the first alone and the others together.

    Raises
    ------
    InputError
        If predictions differ, or logits by more than rounding.
    """
    expected, found = (torch.cat([run(images[:1]), run(images[1:])]) for run in (network, runner))
    difference = float((expected - found).abs().max())
    other = int((expected.argmax(1) != found.argmax(1)).sum())
    # Not a number compares as false, and so does not pass.
    if other or not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        reason = f"{other} of {len(images)} predictions; logits differ by up to {difference:.2g}"
        raise InputError("the file", allowed=reason, problem="computes other logits")
    return Agreement(len(images), difference)
