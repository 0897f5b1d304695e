"""`robusttrain export`."""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from robusttrain.errors import InputError

if TYPE_CHECKING:
    from robusttrain.export.run import Exported

DESCRIPTION = """\
Write the network of a run as a file for other programs. It takes images in
[0, 1] of any number, and returns logits; normalisation is inside. The file
counts only if it gives the same predictions as the network: both are run on
test images of the run, on one alone and on the others in a batch.

  onnx          for ONNX Runtime, TensorRT and others   robusttrain[onnx]
  torchscript   for torch.jit.load, in Python and C++
  torch_export  for torch.export.load, without the code of the network
  safetensors   the weights alone                       robusttrain[safetensors]

With --spec, the robustness of images is written as VNNLIB files, beside the
network as ONNX: questions for verifiers, with a list of all instances."""

EXAMPLES = """\
examples:
  robusttrain export RUN --to onnx --out net.onnx
  robusttrain export RUN --to torch_export --uint8
  robusttrain export RUN --to onnx --spec --eps 0.03 --indices 0 5 7
  robusttrain 'stages=[evaluate]' checkpoint=net.onnx dataset=digits eps=0.1"""

TO = ("onnx", "torchscript", "torch_export", "safetensors")


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see robusttrain export --help)")


def export(arguments: Sequence[str]) -> None:
    """Run `robusttrain export`; exit with code 1 and a one-line message on invalid input."""
    try:
        chosen = _parser().parse_intermixed_args(arguments)
        _refuse_without_effect(chosen)
        # Imported here, since the help needs no torch.
        from robusttrain.export.run import Request, exported

        request = Request(**vars(chosen))
        _print(exported(request))
    except InputError as error:
        sys.exit(f"robusttrain: {error}")


def _parser() -> ArgumentParser:
    parser = _Parser(
        "robusttrain export",
        usage="robusttrain export RUN --to FORMAT [--out FILE] [--uint8] [--spec ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="a run, or pretrained:NAME")
    parser.add_argument("--to", required=True, choices=TO, metavar="FORMAT", help=", ".join(TO))
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the file; model.onnx and so on by default"
    )
    parser.add_argument("--uint8", action="store_true", help="take bytes from 0 to 255")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="the files of the data set")
    parser.add_argument(
        "--trust", nargs="+", default=[], metavar="PACKAGE", help="packages with code of the run"
    )
    spec = parser.add_argument_group("VNNLIB")
    spec.add_argument("--spec", action="store_true", help="also write VNNLIB files, to FILE-spec/")
    spec.add_argument("--eps", type=float, help="radius in linf; that of the run by default")
    spec.add_argument(
        "--indices", type=int, nargs="+", metavar="I",
        help="images by their index in samples.csv; the first 10 of the test set by default",
    )  # fmt: skip
    return parser


def _refuse_without_effect(chosen: Namespace) -> None:
    for name in ("eps", "indices"):
        if getattr(chosen, name) is not None and not chosen.spec:
            raise InputError(f"--{name}", allowed="give --spec, too", problem="has no effect")
    if chosen.spec and chosen.to != "onnx":
        raise InputError("--spec", allowed="--to onnx, which verifiers read")
    if chosen.spec and chosen.uint8:
        raise InputError("--spec", allowed="leave out --uint8: the box is one of pixels in [0, 1]")
    if chosen.uint8 and chosen.to == "safetensors":
        allowed = "--to another format: weights have no input"
        raise InputError("--uint8", allowed=allowed, problem="has no effect")


def _print(done: "Exported") -> None:
    agreement = done.agreement
    print(
        f"{done.path} and the network were run on {agreement.images} {done.images}, one alone and "
        f"the others in a batch: all predictions are equal, and logits differ by at most "
        f"{agreement.difference:.2g}"
    )
    for line in done.lines:
        print(line)
    print(done.path)
