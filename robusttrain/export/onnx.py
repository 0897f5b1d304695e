"""ONNX, which most runtimes outside Python read."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from robusttrain.export import Runner
from robusttrain.export.programs import graph, quiet

# The newest one that `checkpoints/onnx_programs.py` can read back.
OPSET = 18

IMAGES, LOGITS = "images", "logits"


class ONNX:
    """A graph of ONNX; the check runs it with ONNX Runtime."""

    suffix = ".onnx"
    holds_code = True
    packages: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")

    def write(
        self, network: nn.Module, example: Tensor, path: Path, about: Mapping[str, str]
    ) -> None:
        """Write the graph for batches of any size."""
        import onnx

        # The fast kernels of attention on a CPU have a memory layout that torch.onnx cannot view.
        with quiet(), sdpa_kernel(SDPBackend.MATH):
            program = torch.onnx.export(
                graph(network, example),
                input_names=[IMAGES],
                output_names=[LOGITS],
                opset_version=OPSET,
                verbose=False,
            )
        assert program is not None, "torch.onnx.export returns the program of a graph"
        model = program.model_proto
        onnx.helper.set_model_props(model, dict(about))
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString())

    def opened(self, path: Path, network: nn.Module) -> Runner:
        """A session of ONNX Runtime on the CPU."""
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run([LOGITS], {IMAGES: images.numpy()})[0])
