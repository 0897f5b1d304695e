"""VNNLIB files, read by a reader of their own."""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from robusttrain.attacks import PGD
from robusttrain.export.vnnlib import specification
from robusttrain.threat import Norm

Logits = list[float]


class Question(NamedTuple):
    """Bounds of each pixel, and whether logits are those of a counterexample."""

    low: list[Fraction]
    high: list[Fraction]
    is_counterexample: Callable[[Logits], bool]


def read(text: str) -> Question:
    """The question of a file, which has to be of these statements only."""
    assert text.startswith("; ")
    bounds: dict[str, dict[int, Fraction]] = {">=": {}, "<=": {}}
    statements = text.splitlines()[1:]
    declared = re.findall(r"^\(declare-const (\w+) Real\)$", text, re.MULTILINE)
    for statement in statements[len(declared) : -1]:
        found = re.fullmatch(r"\(assert \(([<>]=) X_(\d+) ([0-9.]+)\)\)", statement)
        assert found, statement
        bounds[found[1]][int(found[2])] = Fraction(found[3])
    assert re.fullmatch(r"\(assert \(or( \(and \(>= Y_\d+ Y_\d+\)\))+\)\)", statements[-1])
    pairs = [(int(a), int(b)) for a, b in re.findall(r"\(>= Y_(\d+) Y_(\d+)\)", statements[-1])]
    count = len(bounds[">="])
    outputs = {name for pair in pairs for name in pair}
    assert declared == [*(f"X_{i}" for i in range(count)), *(f"Y_{k}" for k in sorted(outputs))]
    low, high = ([bounds[sign][i] for i in range(count)] for sign in (">=", "<="))
    return Question(low, high, lambda y: any(y[a] >= y[b] for a, b in pairs))


@given(
    st.lists(st.integers(0, 255), min_size=4, max_size=4),
    st.floats(0, 0.5),
    st.integers(0, 2),
    st.lists(st.floats(-5, 5), min_size=3, max_size=3),
)
def test_a_file_asks_for_another_class_within_the_box(
    pixels: list[int], eps: float, label: int, logits: list[float]
) -> None:
    image = torch.tensor(pixels, dtype=torch.float32).reshape(1, 2, 2) / 255
    question = read(specification(image, label, 3, eps, "title"))
    for low, high, pixel in zip(question.low, question.high, image.flatten().tolist(), strict=True):
        center, radius, tiny = Fraction(pixel), Fraction(eps), Fraction(1, 10**15)
        assert abs(low - max(Fraction(0), center - radius)) < tiny
        assert abs(high - min(Fraction(1), center + radius)) < tiny
    others = [value for k, value in enumerate(logits) if k != label]
    assert question.is_counterexample(logits) == (max(others) >= logits[label])


def test_what_an_attack_finds_is_a_counterexample() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4)).eval()
    x = torch.rand(8, 1, 3, 3)
    with torch.no_grad():
        y = model(x).argmax(1)
    attack = PGD(Norm.linf, eps=0.2, steps=20)
    adversarial: Tensor = attack(model, x, y, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(adversarial)
    broken = logits.argmax(1) != y
    assert broken.any()
    assert not broken.all()
    rounding = Fraction(1, 10**7)
    for image, label, found, output, is_broken in zip(
        x, y.tolist(), adversarial, logits, broken.tolist(), strict=True
    ):
        question = read(specification(image, label, 4, 0.2, "title"))
        pixels = [Fraction(value) for value in found.flatten().tolist()]
        for low, pixel, high in zip(question.low, pixels, question.high, strict=True):
            assert low - rounding <= pixel <= high + rounding
        assert question.is_counterexample(output.tolist()) == is_broken
