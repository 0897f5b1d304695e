"""Programs of torch: TorchScript and torch.export."""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from robusttrain.checkpoints.about import ABOUT
from robusttrain.export import Runner


class TorchScript:
    """A trace of the network, which `torch.jit.load` reads, also in C++."""

    suffix = ".pt"
    holds_code = True
    packages: tuple[str, ...] = ()

    def write(
        self, network: nn.Module, example: Tensor, path: Path, about: Mapping[str, str]
    ) -> None:
        """Write the operations of one pass, with sizes that follow the batch."""
        with quiet(), torch.no_grad():
            traced = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
            extra = {ABOUT: json.dumps(dict(about))}
            torch.jit.save(traced, path, _extra_files=extra)

    def opened(self, path: Path, network: nn.Module) -> Runner:
        """The program, loaded to the CPU."""
        with quiet():
            program: Runner = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
        return program


class TorchExport:
    """A graph of torch.export, which needs none of the classes of the network."""

    suffix = ".pt2"
    holds_code = True
    packages: tuple[str, ...] = ()

    def write(
        self, network: nn.Module, example: Tensor, path: Path, about: Mapping[str, str]
    ) -> None:
        """Write the graph for batches of any size."""
        program = graph(network, example)
        # A file object, since torch expects a path to end in .pt2.
        with quiet(), path.open("wb") as file:
            torch.export.save(program, file, extra_files={ABOUT: json.dumps(dict(about))})

    def opened(self, path: Path, network: nn.Module) -> Runner:
        """The program, loaded to the CPU."""
        with quiet(), path.open("rb") as file:
            program: Runner = torch.export.load(file).module()
        return program


def graph(network: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The graph of `network` in eval mode, for batches of any size."""
    any_batch = ({0: torch.export.Dim("batch")},)
    with quiet(), torch.no_grad():
        return torch.export.export(network, (example,), dynamic_shapes=any_batch)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings of torch about its own exporters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
