"""Networks as ONNX, read back as modules that have gradients.

onnx2torch builds the module. It knows the operations of ONNX 17 and earlier, and no shapes that
keep a zero, so that newer graphs are first translated. What it builds has to compute what ONNX
Runtime computes.
"""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robusttrain.errors import InputError

PACKAGES = ("onnx", "onnx2torch", "onnxruntime")

# The newest operations that onnx2torch knows.
NEWEST = 17

# How far logits of the module may differ from those of ONNX Runtime, relative to the largest one.
TOLERANCE = 1e-3

# Images of the comparison.
COMPARED = 3


def load(path: Path, key: str = "checkpoint") -> nn.Module:
    """The network in a file, in eval mode, from images to logits.

    Reading runs no code from the file: a graph of ONNX names operations, and has no others.

    Raises
    ------
    InputError
        If a package is missing, or the network takes anything but float images in batches of any
        size, has an operation that onnx2torch does not know, or computes something else than in
        ONNX Runtime.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        problem = f"is a program of ONNX, which needs {', '.join(missing)}"
        raise InputError(key, path, "pip install 'robusttrain[onnx]'", problem)
    import onnx
    import onnx2torch

    graph = onnx.load(path)
    shape = _image_shape(graph, path, key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module: nn.Module = onnx2torch.convert(_translated(graph)).eval()
        # The translator raises RuntimeError, and onnx2torch NotImplementedError and others.
        except Exception as error:
            reason = " ".join(str(error).split())[-200:]
            allowed = f"export it with torch.export instead; onnx2torch: {reason}"
            raise InputError(key, path, allowed, "has operations without gradients here") from error
        _refuse_other_logits(module, path, shape, key)
    return module


def _image_shape(graph: Any, path: Path, key: str) -> list[int]:
    """The shape (C, H, W) of the images that a network takes."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    inputs = [given for given in graph.graph.input if given.name not in weights]
    if len(inputs) != 1:
        raise InputError(key, path, "it must take images alone", f"takes {len(inputs)} inputs")
    taken = inputs[0].type.tensor_type
    # The number of float32 in the enumeration of ONNX.
    if taken.elem_type != 1:
        allowed = "it must take float images in [0, 1]: export it without --uint8"
        raise InputError(key, path, allowed, "takes images of another type than float32")
    batch, *shape = (axis.dim_value for axis in taken.shape.dim)
    if batch > 0:
        allowed = "export it with a dynamic batch dimension"
        raise InputError(key, path, allowed, f"takes {batch} images at a time")
    return shape


def _translated(graph: Any) -> Any:
    """The graph in operations that onnx2torch knows."""
    import onnx

    if max(used.version for used in graph.opset_import if used.domain in ("", "ai.onnx")) > NEWEST:
        graph = onnx.version_converter.convert_version(graph, NEWEST)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    for node in graph.graph.node:
        kept = [a for a in node.attribute if a.name != "allowzero"]
        # A zero in a shape keeps the size of the input, or means an empty axis with `allowzero`.
        if len(kept) < len(node.attribute) and 0 not in constants.get(node.input[1], ()):
            del node.attribute[:]
            node.attribute.extend(kept)
    return graph


def _refuse_other_logits(module: nn.Module, path: Path, shape: list[int], key: str) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(COMPARED, *shape, generator=generator)
    name = session.get_inputs()[0].name
    expected = torch.from_numpy(session.run(None, {name: images.numpy()})[0])
    with torch.no_grad():
        difference = float((module(images) - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        allowed = f"its logits differ by {difference:.2g} from those of ONNX Runtime"
        raise InputError(key, path, allowed, "is not read correctly by onnx2torch")
