"""What of a robustness rests on noise: attacked with the noise off, and with one draw for all."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.pgd import PGD
from robusttrain.data import Split
from robusttrain.evaluation import Evaluation
from robusttrain.evaluation.attack_suite import attack_all, open_session
from robusttrain.evaluation.audit import (
    PIECES,
    PIECES_OF_DRAWS,
    PIECES_OF_NOISE,
    _Measured,
    audit,
    pieces_of,
)
from robusttrain.evaluation.curves import Probe
from robusttrain.evaluation.findings import Audit, Check
from robusttrain.noise.control import drawing_from, noise_held
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.smoothing import Smoothing
from robusttrain.report.ledger import Row
from robusttrain.runtime.progress import unreported
from robusttrain.threat import Norm, Threat

EPS = 0.1
RESTS = "accuracy lost with fixed or no noise"
PROBE = PGD(eps=EPS, steps=10)


class Pixel(nn.Module):
    """Class 1 where the one pixel is above 1/2, by logits with a layer behind them."""

    def __init__(self, slope: float = 5.0) -> None:
        super().__init__()
        self.slope = slope
        self.logits = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        score = self.slope * (x.flatten(1) - 0.5)
        logits: Tensor = self.logits(torch.cat([-score, score], 1))
        return logits


def pixels(distances: Sequence[float]) -> Split:
    """Images so far on the right side of the boundary, of either class."""
    labels = torch.arange(len(distances)) % 2
    values = 127.5 + 255 * torch.tensor(distances) * (2 * labels - 1)
    return Split(values.round().to(torch.uint8).view(-1, 1, 1, 1), labels)


def probe_of(model: nn.Module, data: Split, **settings: Any) -> Probe:
    chosen = Evaluation({}, **{"eot": 2, "votes": 30, **settings})
    _, subject = open_session(model.eval(), data, chosen, 0)
    return Probe(subject, PROBE)


def measured(probe: Probe) -> _Measured:
    return _Measured(probe, probe.broken(PROBE, "probe"), {}, cast(Any, None), unreported)


def named(probe: Probe) -> tuple[Check, list[Row]]:
    """The check, and the rows of an attack without noise that it rests on."""
    closer = measured(probe)
    rows = closer.without_noise()
    return closer.rests_on_noise(rows[1:]), rows


def noisy(slope: float, noise: Gaussian | Smoothing) -> nn.Module:
    model = Pixel(slope)
    noise.install(model, 3)
    return model


# Distances that neither eps nor a draw can bring next to the boundary.
SPREAD = [0.05, 0.05, 0.15, 0.15, 0.25, 0.25, 0.35, 0.35, 0.45, 0.45] * 4


def test_with_one_draw_for_all_passes_a_shift_decides() -> None:
    """One draw z for every image and pass is another boundary, at 1/2 - z."""
    # One class is out of reach: the other one would gain what it loses.
    data = pixels([far for near in SPREAD for far in (0.45, near)])
    model = noisy(5.0, Gaussian(0.3, predict=True))
    probe = probe_of(model, data)
    found = {r.attack: r.as_dict() for r in measured(probe).without_noise()}
    assert list(found) == ["noise_off", "noise_off_attacked", "noise_fixed"]
    with noise_held(model, probe.subject.seed), torch.no_grad():
        z = float(model(torch.full((1, 1, 1, 1), 0.5))[0, 1] / 5)
    side = 2 * data.labels.numpy() - 1
    gaps = side * (data.images.numpy().ravel() / 255 - 0.5)
    left = gaps + side * z - EPS
    assert abs(left).min() > 0.002
    expected = {
        "noise_off": (0.0, gaps < 0),
        "noise_off_attacked": (EPS, gaps < EPS),
        "noise_fixed": (EPS, left < 0),
    }
    for name, (eps, broken) in expected.items():
        assert found[name] == pytest.approx(
            Row.counted(name, Threat(Norm.linf, eps), broken).as_dict(), nan_ok=True
        ), name
    assert found["noise_fixed"]["accuracy"] != found["noise_off_attacked"]["accuracy"]


def test_a_look_with_one_draw_costs_one_pass() -> None:
    passes: list[int] = []
    model = noisy(5.0, Gaussian(0.1, predict=True))
    probe = probe_of(model, pixels([0.45] * 10), eot=9, votes=99)
    closer = measured(probe)
    model.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    closer.without_noise()
    # Both times four looks for randomness and one for a softmax, one at the clean images and one at
    # those of the attack, and ten steps.
    assert sum(passes) == 10 * (2 * (4 + 1 + 1 + 1 + 10))


def test_streams_and_switches_are_left_as_they_were() -> None:
    model, twin = (noisy(5.0, Gaussian(0.1, predict=True)).eval() for _ in range(2))
    x = torch.rand(3, 1, 1, 1)
    measured(probe_of(model, pixels(SPREAD))).without_noise()
    assert torch.equal(model(x), twin(x))
    with drawing_from(model, 0):
        assert not torch.equal(model(x), model(x))


def test_robustness_that_is_noise_alone_is_named() -> None:
    """Logits that noise has drowned are a lottery, and no gradient shows how to change its luck.

    What is won without moving the image is won under attack, too, half of the images, and all are
    lost where the noise is off.
    """
    drowned = noisy(5.0, Gaussian(1e4, predict=True, at="logits"))
    check, rows = named(probe_of(drowned, pixels([0.05] * 100)))
    accuracies = [row.accuracy for row in rows]
    assert accuracies[:2] == [1.0, 0.0]
    assert check.verdict == "warn"
    assert 30 < check.figure < 70


@pytest.mark.parametrize("noise", [Gaussian(0.01, predict=True), Smoothing(0.01)])
def test_an_honest_model_passes(noise: Gaussian | Smoothing) -> None:
    """With little noise the same images fall with it, without it and with one draw of it."""
    check, _ = named(probe_of(noisy(5.0, noise), pixels(SPREAD)))
    assert (check.check, check.figure, check.verdict) == (RESTS, 0, "pass")


@pytest.mark.parametrize(
    ("off", "fixed", "figure", "verdict"),
    [
        (500, 500, 0, "pass"),
        (600, 700, -10, "pass"),
        (470, 500, 3, "pass"),
        (469, 500, 3.1, "warn"),
        (500, 469, 3.1, "warn"),
        (0, 0, 50, "warn"),
    ],
)
def test_the_smaller_one_of_both_counts(off: int, fixed: int, figure: float, verdict: str) -> None:
    """To rest on noise is no fault: the check fails nowhere."""
    probe = probe_of(noisy(5.0, Gaussian(0.1, predict=True)), pixels([0.3] * 2))
    closer = _Measured(probe, np.arange(1000) >= 500, {}, cast(Any, None), unreported)
    found = closer.rests_on_noise([counted(count) for count in (off, fixed)])
    assert found.figure == pytest.approx(figure)
    assert found.verdict.value == verdict


def counted(standing: int) -> Row:
    """Of 1,000 images."""
    return Row.counted("noise", Threat(Norm.linf, EPS), np.arange(1000) >= standing)


def audited(model: nn.Module) -> tuple[Audit, int]:
    settings = Evaluation({"pgd": PROBE}, eot=1, votes=5, probe=PROBE)
    index, subject = open_session(model.eval(), pixels(SPREAD[:10]), settings, 0)
    pieces: list[int] = []
    expected = pieces_of(subject)
    suite = settings.suite(subject.num_classes, subject.random)
    ledger = attack_all(subject, index, suite, False, threat=Threat(Norm.linf, EPS))
    closer = audit(Probe(subject, PROBE), suite, ledger, pieces.append)
    assert len(pieces) == expected
    return closer, expected


def test_an_audit_of_a_random_model_has_the_rows_and_the_check() -> None:
    closer, pieces = audited(noisy(5.0, Gaussian(0.05, predict=True)))
    names = [control.attack for control in closer.controls]
    assert names[:4] == ["control", "noise_off", "noise_off_attacked", "noise_fixed"]
    assert RESTS in [check.check for check in closer.checks]
    assert pieces == PIECES + PIECES_OF_DRAWS + PIECES_OF_NOISE


def test_an_audit_of_another_model_has_neither() -> None:
    closer, pieces = audited(noisy(5.0, Gaussian(0.05, predict=False)))
    assert [control.attack for control in closer.controls] == ["control"]
    assert RESTS not in [check.check for check in closer.checks]
    assert pieces == PIECES
