"""Models that draw noise when they predict: no attack profits from luck, and draws repeat."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks import Attack
from robusttrain.attacks.apgd import APGD
from robusttrain.attacks.attack_loss import AttackLoss, cross_entropy
from robusttrain.attacks.carlini_wagner import CarliniWagner
from robusttrain.attacks.deepfool import DeepFool
from robusttrain.attacks.fab import FAB
from robusttrain.attacks.model_view import QueryCounter
from robusttrain.attacks.objectives import AttackObjective
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.square import Square
from robusttrain.data import Split
from robusttrain.evaluation import Evaluation, evaluate
from robusttrain.evaluation.attack_suite import open_session
from robusttrain.evaluation.curves import Probe, over_draws
from robusttrain.evaluation.voting import classes_and_randomness
from robusttrain.noise.control import noise_off
from robusttrain.noise.gaussian import Gaussian
from robusttrain.report.ledger import Ledger
from robusttrain.threat import Norm, Threat

SIGMA = 0.1


class Step(nn.Module):
    """Class 1 where the one pixel is above 1/2, in a steep but smooth way."""

    def forward(self, x: Tensor) -> Tensor:
        score = 100 * (x.flatten(1) - 0.5)
        return torch.cat([-score, score], 1)


class Undeclared(Step):
    """The same behind noise from torch's global stream, which nobody has announced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + SIGMA * torch.randn_like(x))


def declared() -> nn.Module:
    model = Step()
    Gaussian(SIGMA, predict=True).install(model, 3)
    return model.eval()


def split_at(distances: list[float]) -> Split:
    """Images so far on the right side of the boundary; on the wrong one where negative."""
    labels = torch.arange(len(distances)) % 2
    pixel = 127.5 + 255 * torch.tensor(distances) * (2 * labels - 1)
    return Split(pixel.round().to(torch.uint8).view(-1, 1, 1, 1), labels)


# One pass in six is wrong on most of these images, but the vote on one in fourteen only.
NOISY = split_at([0.1] * 350 + [0.01] * 25 + [-0.1] * 25)


def ledger_of(
    model: nn.Module, data: Split, attacks: dict[str, Attack], *, eps: float, **settings: Any
) -> Ledger:
    return evaluate(
        model, data, Evaluation(attacks, **settings), threat=Threat(Norm.linf, eps), seed=0
    )


def suite(eps: float) -> dict[str, Attack]:
    return {
        "apgd_ce": APGD(eps=eps, steps=10),
        "apgd_t": APGD(eps=eps, steps=5, targets=9, objective=AttackObjective.dlr),
        "square": Square(eps=eps, queries=20),
        "pgd": PGD(eps=eps, steps=10, restarts=2, stop_early=True),
    }


@pytest.mark.parametrize("survivors_only", [True, False])
@pytest.mark.parametrize(("votes", "make"), [(1, declared), (20, declared), (20, Undeclared)])
def test_a_suite_without_a_radius_leaves_the_clean_accuracy(
    survivors_only: bool, votes: int, make: Any
) -> None:
    """AutoAttack's mode for random models takes 94.6 % down to 83.0 % at eps = 1e-9."""
    ledger = ledger_of(
        make().eval(), NOISY, suite(1e-9), eps=1e-9, eot=2, votes=votes,
        survivors_only=survivors_only,
    )  # fmt: skip
    report = ledger.report(Threat(Norm.linf, 0)).set_index("attack")
    clean = report.loc["clean"]
    assert 0.75 < clean["accuracy"] < 0.95
    assert (report["accuracy"] >= clean["ci_low"]).all()
    assert (report["accuracy"] <= clean["accuracy"]).all()


def test_the_suite_is_no_weaker_for_that() -> None:
    """Images at 0.1 from the boundary fall to a radius of 0.2, those at 0.45 do not."""
    data = split_at([0.1] * 50 + [0.45] * 50)
    for name, outcome in ledger_of(
        declared(), data, suite(0.2), eps=0.2, eot=4, votes=20
    ).outcomes.items():
        assert outcome.broken.tolist() == [True] * 50 + [False] * 50, name


def test_no_look_at_a_random_model_is_a_success() -> None:
    logits, y = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 0])
    for random, fooled in ((False, [True, False]), (True, [False, False])):
        surrogate = AttackLoss(
            QueryCounter(Step(), 8, random=random), y, cross_entropy, targeted=False
        )
        assert surrogate.succeeded(logits).tolist() == fooled
        targeted = AttackLoss(
            QueryCounter(Step(), 8, random=random), y, cross_entropy, targeted=True
        )
        assert targeted.succeeded(logits).tolist() == ([False, True] if not random else fooled)


def test_a_search_on_a_random_model_goes_to_its_end() -> None:
    data = split_at([0.2] * 30)
    attacks: dict[str, Attack] = {"pgd": PGD(eps=0.5, steps=5, stop_early=True)}
    still = ledger_of(Step().eval(), data, attacks, eps=0.5).outcomes["pgd"]
    moving = ledger_of(declared(), data, attacks, eps=0.5, eot=3, votes=2).outcomes["pgd"]
    assert still.forward_passes < 30 * 6
    assert (moving.forward_passes, moving.backward_passes) == (30 * 6 * 3, 30 * 5 * 3)


@pytest.mark.parametrize(("make", "random"), [(Step, False), (declared, True), (Undeclared, True)])
def test_randomness_is_seen_whether_declared_or_not(make: Any, random: bool) -> None:
    assert classes_and_randomness(make().eval(), torch.rand(4, 1, 1, 1)) == (2, random)


def test_noise_of_training_alone_makes_no_random_model() -> None:
    model = Step()
    Gaussian(SIGMA, train=True, predict=False).install(model, 0)
    assert classes_and_randomness(model.eval(), torch.rand(4, 1, 1, 1)) == (2, False)


@pytest.mark.parametrize("make", [declared, Undeclared])
def test_draws_repeat_and_are_nobody_elses(make: Any) -> None:
    """Not even where the noise comes from the global stream, and that stood elsewhere before."""
    ledgers = []
    for start in (1, 2):
        torch.manual_seed(start)
        before = torch.get_rng_state()
        # Near the boundary, where the vote itself hangs on the draws.
        data = split_at([0.01] * 60)
        ledgers.append(ledger_of(make().eval(), data, suite(0.005), eps=0.005, eot=2, votes=3))
        assert torch.equal(torch.get_rng_state(), before)
    first, second = ledgers
    pd.testing.assert_frame_equal(first.samples(), second.samples(), check_exact=True)
    assert first.adversarial is not None
    assert second.adversarial is not None
    assert first.adversarial.keys() == second.adversarial.keys()
    for threat, images in first.adversarial.items():
        np.testing.assert_array_equal(images, second.adversarial[threat])
    assert 0 < first.misclassified.sum() < 60


def test_the_noise_goes_on_where_it_was() -> None:
    model, twin, x = declared(), declared(), torch.rand(3, 1, 1, 1)
    assert torch.equal(model(x), twin(x))
    ledger_of(model, NOISY, {"pgd": PGD(eps=0.1, steps=2)}, eps=0.1, eot=2, votes=2)
    assert torch.equal(model(x), twin(x))


ALONG: dict[str, Attack] = {
    "fab": FAB(eps=0.1, steps=2),
    "fab_t": FAB(eps=0.1, steps=2, targets=1),
    "deepfool": DeepFool(eps=0.1, steps=2),
    "cw": CarliniWagner(norm=Norm.l2, eps=0.1, steps=2, binary_steps=1),
    "pgd": PGD(eps=0.1, steps=2),
}


def test_a_random_model_has_no_boundary_to_walk_along() -> None:
    settings = Evaluation(ALONG)
    assert list(settings.suite(2, random=False)) == list(ALONG)
    assert list(settings.suite(2, random=True)) == ["pgd"]
    data = split_at([0.3] * 4)
    assert list(ledger_of(declared(), data, ALONG, eps=0.1, eot=1, votes=1).outcomes) == ["pgd"]
    assert list(ledger_of(Step().eval(), data, ALONG, eps=0.1).outcomes) == list(ALONG)


def test_noise_can_be_switched_off_for_a_while() -> None:
    model, x = declared(), torch.rand(5, 1, 1, 1)
    with noise_off(model):
        assert torch.equal(model(x), Step()(x))
    assert not torch.equal(model(x), Step()(x))
    with pytest.raises(KeyError), noise_off(model):
        raise KeyError
    assert not torch.equal(model(x), Step()(x))


def test_gradients_are_averaged_over_1_5_20_and_80_draws() -> None:
    model, passes = declared(), [0]
    _, subject = open_session(model, split_at([0.3] * 10), Evaluation(eot=2, votes=3), 0)
    assert subject.random
    model.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    sums: list[int] = []
    probe = Probe(subject, PGD(eps=0.1, steps=4))
    points = over_draws(probe, lambda steps: sums.append(sum(passes)))
    assert [(p.curve, p.eot, p.steps) for p in points] == [
        ("eot", draws, 4) for draws in (1, 5, 20, 80)
    ]
    # A look of three draws at what the four steps have come to; before the first, one at the
    # images, and one for a softmax.
    spent = np.diff([0, *sums]) - [10 * (3 + 1), 0, 0, 0]
    assert spent.tolist() == [10 * (3 + 4 * draws) for draws in (1, 5, 20, 80)]
    assert [p.row.accuracy for p in points] == [1.0] * 4
