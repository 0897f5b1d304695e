"""Export the model of a run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robusttrain import ranges
from robusttrain._version import __version__
from robusttrain.checkpoints import external
from robusttrain.checkpoints.about import BYTES, FLOATS, INPUT
from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.data import as_input
from robusttrain.errors import InputError
from robusttrain.export import vnnlib
from robusttrain.export.files import FORMATS, Agreement, FromBytes, refuse_missing, write_checked
from robusttrain.noise.layer import predicts_randomly
from robusttrain.runs.saved_data import SavedData, saved_data
from robusttrain.runs.saved_model import restored
from robusttrain.threat import Norm

# Test images for the check.
CHECKED = 64

# Images with a specification, and the seconds that the list of instances gives a verifier for each.
SPECIFIED, SECONDS = 10, 300


@dataclass(frozen=True)
class Request:
    """What `robusttrain export` is asked for; see its help."""

    run: str
    to: str
    out: Path | None = None
    uint8: bool = False
    data_dir: Path | None = None
    trust: Sequence[str] = ()
    spec: bool = False
    eps: float | None = None
    indices: Sequence[int] | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return self.out or Path(f"model{FORMATS[self.to].suffix}")


class Exported(NamedTuple):
    """What was written.

    Parameters
    ----------
    path
        The file.
    agreement
        How it agrees with the network.
    images
        On what images, in words.
    lines
        What else there is to say.
    """

    path: Path
    agreement: Agreement
    images: str
    lines: Sequence[str]


class _Instance(NamedTuple):
    position: int
    image: Tensor
    label: int


def exported(request: Request) -> Exported:
    """Write the file, and the specifications if they are asked for.

    Raises
    ------
    InputError
        If the request is not allowed, or the file does not compute what the network does.
    """
    path, format = request.path, FORMATS[request.to]
    if path.exists():
        raise InputError("--out", path, "another name", "exists already")
    refuse_missing(format)
    saved = _checkpoint(request)
    network = _deterministic(restored(saved, request.run, request.trust), request.run)
    eps = _radius(request, saved) if request.spec else 0.0
    data = saved_data(saved, request.run, request.trust, request.data_dir)
    instances = _instances(request, data) if request.spec else []
    images = data.first(CHECKED).images
    if request.uint8:
        network = FromBytes(network)
    else:
        images = as_input(images)
    agreement = write_checked(network, images, path, format, _about(request, saved))
    lines = [] if not request.spec else [_specified(path, network, instances, eps)]
    return Exported(path, agreement, f"test images of {data.name}", lines)


def _checkpoint(request: Request) -> Checkpoint:
    saved = external.load(request.run, request.trust, key="RUN")
    if not isinstance(saved, Checkpoint):
        allowed = "a run, a checkpoint of one, or pretrained:NAME"
        raise InputError("RUN", request.run, allowed)
    return saved


def _deterministic(model: nn.Module, run: str) -> nn.Module:
    if predicts_randomly(model):
        allowed = "a network whose noise is off in prediction (noise.predict=false)"
        problem = "predicts by a vote over draws of noise, which a file cannot hold"
        raise InputError("RUN", run, allowed, problem)
    return model


def _about(request: Request, saved: Checkpoint) -> dict[str, str]:
    """The metadata of the file."""
    shape = ", ".join(map(str, saved.image_shape))
    return {
        "robusttrain": __version__,
        INPUT: f"images (N, {shape}), {BYTES if request.uint8 else FLOATS}",
        "output": f"logits (N, {saved.num_classes})",
        "classes": json.dumps(saved.class_names),
        "options": json.dumps(saved.names),
        "threat": f"{saved.config['norm']}, eps {saved.config['eps']}",
    }


def _radius(request: Request, saved: Checkpoint) -> float:
    norm, eps = saved.config["norm"], saved.config["eps"]
    if request.eps is None and norm != Norm.linf:
        allowed = f"give a radius in linf: the run has {norm}"
        raise InputError("--eps", allowed=allowed, problem="is needed")
    radius = float(eps if request.eps is None else request.eps)
    ranges.within(0, 1, **{"--eps": radius})
    return radius


def _instances(request: Request, data: SavedData) -> list[_Instance]:
    positions = data.found.positions.tolist()
    chosen = positions[:SPECIFIED] if request.indices is None else list(request.indices)
    for index in chosen:
        allowed = f"the index of a test image of {data.name}, as in samples.csv"
        ranges.require(index in positions, "--indices", index, allowed)
    rows = torch.tensor([positions.index(index) for index in chosen])
    split = data.samples.take(rows).loaded()
    pixels, labels = as_input(split.images), split.labels.tolist()
    return [_Instance(*each) for each in zip(chosen, pixels, labels, strict=True)]


def _specified(path: Path, network: nn.Module, instances: Sequence[_Instance], eps: float) -> str:
    """Write the specification of each image that is classified correctly; returns a line."""
    with torch.no_grad():
        logits = network(torch.stack([instance.image for instance in instances]))
    right = [
        instance
        for instance, predicted in zip(instances, logits.argmax(1).tolist(), strict=True)
        if predicted == instance.label
    ]
    files = [
        (
            f"image-{index}.vnnlib",
            vnnlib.specification(
                image, label, logits.shape[1], eps, f"image {index} of class {label}, linf {eps}"
            ),
        )
        for index, image, label in right
    ]
    folder = path.with_name(f"{path.name}-spec")
    vnnlib.write(folder, files, path, SECONDS)
    wrong = len(instances) - len(right)
    without = f"; {wrong} images are misclassified as they are, and have none" if wrong else ""
    return f"{folder} has the specifications of {len(right)} images at linf {eps}{without}"
