"""Models whose logits are not float32: they train, and are evaluated by every attack."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from robusttrain.attacks.apgd import APGD
from robusttrain.attacks.objectives import AttackObjective
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.square import Square
from robusttrain.data import Split
from robusttrain.evaluation import Evaluation, evaluate
from robusttrain.evaluation.pipeline import EvaluationCache, Plan, run_evaluation
from robusttrain.noise.gaussian import Gaussian
from robusttrain.threat import Norm, Threat
from toys.attacks import ATTACKS, seeded
from toys.formats import FORMATS, InFormat
from toys.training import quiet

CLASSES, SHAPE = 5, (1, 4, 4)
every_format = pytest.mark.parametrize("dtype", FORMATS, ids=str)


def network() -> nn.Module:
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(1), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, CLASSES))

    return seeded(build).eval()


def images(model: nn.Module, count: int = 40) -> Split:
    """Images with the labels that `model` gives to them."""
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, *SHAPE), generator=draws, dtype=torch.uint8)
    return Split(pixels, model(pixels / 255).argmax(1))


def broken(model: nn.Module, data: Split, norm: Norm, eps: float) -> dict[str, NDArray[np.bool_]]:
    """Which images each attack breaks."""
    makes = {k: v for k, v in ATTACKS.items() if norm is Norm.l2 or k != "carlini_wagner"}
    suite = {name: make(norm=norm, eps=eps) for name, make in makes.items()}
    ledger = evaluate(
        model, data, Evaluation(suite, eot=2, votes=3), threat=Threat(norm, eps), seed=0
    )
    assert sum(outcome.invalid for outcome in ledger.outcomes.values()) == 0
    return {name: outcome.broken for name, outcome in ledger.outcomes.items()}


@every_format
@pytest.mark.parametrize(("norm", "eps"), [(Norm.linf, 0.1), (Norm.l2, 0.4), (Norm.l1, 1.5)])
def test_every_attack_breaks_the_images_that_it_breaks_in_float32(
    dtype: torch.dtype, norm: Norm, eps: float
) -> None:
    model = network()
    data = images(model)
    theirs = broken(InFormat(model, dtype), data, norm, eps)
    ours = broken(model, data, norm, eps)
    different = {name: int((theirs[name] != ours[name]).sum()) for name in ours}
    if dtype is not torch.float64:
        # In 8 or 11 bits the boundary is elsewhere, which attacks that walk along it meet most.
        different = {k: v for k, v in different.items() if not ATTACKS[k]().traits.walks_boundary}
    assert max(different.values()) <= (0 if dtype is torch.float64 else 3), different
    assert 10 < ours["apgd"].sum() < 30


@every_format
def test_a_softmax_in_another_format_is_left_out(dtype: torch.dtype) -> None:
    """Saturated probabilities would have no gradient; the logits before them do."""
    model = network()
    nn.init.normal_(cast(nn.Linear, model[3]).weight, std=2000)
    ended = nn.Sequential(InFormat(model, dtype), nn.Softmax(1)).eval()
    data, pgd = images(model), {"pgd": PGD(eps=0.1, steps=3, objective=AttackObjective.margin)}
    ledgers = [
        evaluate(each, data, Evaluation(pgd), threat=Threat(Norm.linf, 0.1), seed=0)
        for each in (InFormat(model, dtype), ended)
    ]
    ours, theirs = (int(ledger.outcomes["pgd"].broken.sum()) for ledger in ledgers)
    assert theirs == ours > 5


@every_format
@pytest.mark.parametrize("draws", [False, True])
def test_the_audit_finds_nothing_wrong(dtype: torch.dtype, draws: bool, tmp_path: Path) -> None:
    model = InFormat(network(), dtype)
    Gaussian(0.01, predict=draws).install(model, 0)
    attack = APGD(eps=0.1, steps=10)
    settings = Evaluation(
        {"apgd": attack, "square": Square(eps=0.1, queries=20)}, eot=2, votes=20,
        audit=True, probe=PGD(eps=0.1, steps=10), save_adversarial=True,
    )  # fmt: skip
    plan = Plan(settings, Threat(Norm.linf, 0.1), 0)
    data = images(network())
    workplace = EvaluationCache(tmp_path / "pieces", None)
    found = run_evaluation(model.eval(), data, plan, workplace, quiet()).found
    assert found is not None
    assert found.ledger.outcomes["apgd"].broken.sum() > 10
    assert [check for check in found.audit.checks if check.verdict == "fail"] == []
