"""The schedule of the training attack, and what cannot be scheduled."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from torch import Tensor, nn

from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.pgd import PGD
from robusttrain.defenses.alp import ALP, Pairing
from robusttrain.defenses.alpha_mix import AlphaMix
from robusttrain.defenses.ibp import MTLIBP
from robusttrain.defenses.lsa import LSA
from robusttrain.defenses.rt import RT
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError
from robusttrain.training.curriculum import Curriculum, smooth


def test_nothing_grows_by_default() -> None:
    defense = WorstCase(PGD())
    assert Curriculum().at(defense, 1, 10) is defense


def test_the_radius_grows_in_a_straight_line_and_stays() -> None:
    # Powers of two, so that the shares are exact.
    defense = WorstCase(PGD(eps=0.5, steps=7))
    curriculum = Curriculum(eps_warmup=0.5)
    grown = [curriculum.at(defense, epoch, 8) for epoch in range(1, 9)]
    radii = [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert grown == [WorstCase(PGD(eps=radius, steps=7)) for radius in radii]
    # The next epoch starts from the settings, not from the copy of the last epoch.
    assert defense == WorstCase(PGD(eps=0.5, steps=7))


def test_a_radius_grows_with_every_batch_if_set() -> None:
    curriculum, defense = Curriculum(eps_warmup=0.5, per_batch=True), WorstCase(PGD(eps=0.5))
    at = [(1, 0.0), (1, 0.5), (2, 0.0), (4, 0.75), (5, 0.0), (8, 0.5)]
    radii = [curriculum.at(defense, epoch, 8, passed).attack.eps for epoch, passed in at]  # type: ignore[attr-defined]
    assert radii == [0.0, 0.0625, 0.125, 0.46875, 0.5, 0.5]


@pytest.mark.parametrize("epochs", [1, 2, 10])
def test_the_last_epoch_has_the_whole_radius(epochs: int) -> None:
    for share in (1e-3, 0.5, 1.0):
        assert Curriculum(share).at(RT(eps=0.3), epochs, epochs).eps == pytest.approx(0.3)


def test_the_defense_s_own_radius_grows_and_is_used() -> None:
    half = Curriculum(eps_warmup=1.0).at(LSA(eps=0.4), 1, 2)
    assert half == LSA(eps=0.2)
    assert half._worst_case.attack.eps == 0.2
    mixed = Curriculum(eps_warmup=1.0).at(AlphaMix(FGSM(eps=0.4), 0.3), 1, 2)
    assert mixed == AlphaMix(FGSM(eps=0.2), 0.3)


def test_where_defense_and_attack_have_a_radius_both_grow() -> None:
    half = Curriculum(eps_warmup=1.0).at(MTLIBP(PGD(eps=0.2), eps=0.4, weight=0.5), 1, 2)
    # The weight of the bounds too, which starts at 0 in the paper.
    assert half == MTLIBP(PGD(eps=0.1), eps=0.2, weight=0.25)


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"),
    [
        ([3], 4, [3, 3, 3, 3]),
        ([1, 5], 4, [1, 1, 5, 5]),
        ([1, 5], 5, [1, 1, 1, 5, 5]),
        ([2, 4, 8], 3, [2, 4, 8]),
        ([2, 4, 8], 7, [2, 2, 2, 4, 4, 8, 8]),
    ],
)
def test_steps_grow_in_equal_shares(steps: list[int], epochs: int, expected: list[int]) -> None:
    curriculum = Curriculum(steps=steps)
    grown = [curriculum.at(WorstCase(PGD(steps=9)), e, epochs) for e in range(1, epochs + 1)]
    assert [defense.attack for defense in grown] == [PGD(steps=number) for number in expected]


def test_radius_and_steps_grow_together() -> None:
    curriculum = Curriculum(eps_warmup=1.0, steps=[2, 6])
    assert curriculum.at(WorstCase(PGD(eps=0.4)), 1, 2) == WorstCase(PGD(eps=0.2, steps=2))


@dataclass
class Stateful:
    """An attack with a field `steps` that is a counter, not a setting."""

    eps: float = 0.4
    steps: int = field(default=3, init=False)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
        return x


class Foreign:
    """An attack that is not a dataclass."""

    eps = 0.4
    steps = 3

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("curriculum", "defense", "key"),
    [
        (Curriculum(steps=[1, 2]), Standard(), "steps"),
        (Curriculum(steps=[1, 2]), RT(), "steps"),
        (Curriculum(steps=[1, 2]), LSA(), "steps"),
        (Curriculum(steps=[1, 2]), WorstCase(FGSM()), "steps"),
        (Curriculum(steps=[1, 2]), WorstCase(Stateful()), "steps"),
        (Curriculum(steps=[1, 2]), WorstCase(Foreign()), "steps"),
        (Curriculum(eps_warmup=0.5), WorstCase(Foreign()), "eps"),
    ],
)
def test_what_cannot_grow_is_refused_by_name(
    curriculum: Curriculum, defense: Any, key: str
) -> None:
    name = type(defense).__name__
    with pytest.raises(InputError, match=rf"training\.curriculum cannot change '{key}'.*{name}"):
        curriculum.at(defense, 1, 10)


@pytest.mark.parametrize("defense", [Standard(), ALP(PGD(), pairing=Pairing.clean)])
def test_a_defense_without_a_radius_is_left_as_it_is(defense: Any) -> None:
    assert Curriculum(eps_warmup=0.5).at(defense, 1, 10) is defense


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_the_warmup_is_a_share(share: float) -> None:
    with pytest.raises(InputError, match=r"^eps_warmup=.* is not allowed"):
        Curriculum(eps_warmup=share)


def test_an_attack_takes_one_step_at_least() -> None:
    with pytest.raises(InputError, match=r"^steps=0 is not allowed"):
        Curriculum(steps=[5, 0])


def test_a_smoothed_warm_up_is_the_curve_of_the_paper() -> None:
    """Zhang et al. 2020: a (s)^4 up to the bend, then a line with the same value and slope."""
    shares = [step / 1000 for step in range(1001)]
    curve = [smooth(share) for share in shares]
    assert (curve[0], curve[-1]) == (0.0, pytest.approx(1.0))
    slopes = [1000 * (after - before) for before, after in pairwise(curve)]
    assert slopes[250:] == pytest.approx([slopes[-1]] * 750)
    assert slopes[249] == pytest.approx(slopes[250], rel=0.01)
    for share in (0.05, 0.1, 0.2):
        assert smooth(share) / smooth(0.25) == pytest.approx((share / 0.25) ** 4)


def test_the_radius_is_zero_until_the_delay_is_over() -> None:
    curriculum = Curriculum(eps_delay=0.25, eps_warmup=0.5, per_batch=True)
    defense = WorstCase(PGD(eps=0.5))
    at = [(1, 0.5), (2, 0.0), (3, 0.0), (4, 0.5), (6, 0.99), (7, 0.0), (8, 0.5)]
    radii = [curriculum.at(defense, epoch, 8, passed).attack.eps for epoch, passed in at]  # type: ignore[attr-defined]
    assert radii == pytest.approx([0, 0, 0, 0.1875, 0.49875, 0.5, 0.5])


def test_delay_and_warm_up_fit_into_the_training() -> None:
    with pytest.raises(
        InputError, match=r"^eps_delay=0.6 is not allowed: it must be from 0 to 0.5"
    ):
        Curriculum(eps_warmup=0.5, eps_delay=0.6)
