"""Networks of timm and torchvision in every format, on batches of another size."""

from pathlib import Path

import pytest
import torch

from robusttrain.export.files import FORMATS, write_checked
from robusttrain.models import build_model
from toys.libraries import ARCHITECTURES
from toys.tries import tries

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

CLASSES, SHAPE = 4, (3, 32, 32)

# ONNX takes seconds for each.
IN_ONNX = tries(["beit", "resnet"], [*ARCHITECTURES])
EACH = [
    (kind, name) for kind in ARCHITECTURES for name in FORMATS if name != "onnx" or kind in IN_ONNX
]


@pytest.mark.parametrize(("kind", "name"), EACH)
def test_predictions_are_those_of_the_network(kind: str, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(ARCHITECTURES[kind], CLASSES, SHAPE).eval()
    images = torch.rand(9, *SHAPE, generator=torch.Generator().manual_seed(1))
    path = tmp_path / f"net{FORMATS[name].suffix}"
    assert write_checked(model, images[:4], path, FORMATS[name], {}).images == 4
    with torch.no_grad():
        found, expected = FORMATS[name].opened(path, model)(images), model(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.argmax(1), expected.argmax(1))
