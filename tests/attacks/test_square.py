"""Square Attack: outputs only, one pass a query, and what it finds on linear models."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.attack_loss import Label
from robusttrain.attacks.square import Square
from robusttrain.errors import InputError
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.attacks import Affine, everywhere, generator, interior

DUAL_ORDER = {Norm.linf: 1, Norm.l2: 2, Norm.l1: float("inf")}
every_norm = pytest.mark.parametrize("norm", list(Norm))


class OutputsOnly(nn.Module):
    """A linear model behind a rounding of its logits, which refuses to be differentiated."""

    def __init__(self, affine: Affine) -> None:
        super().__init__()
        self.affine = affine

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        logits: Tensor = self.affine(x)
        return (16 * logits).round() / 16


def centred(classes: int, shape: tuple[int, ...]) -> tuple[Affine, Tensor, Tensor]:
    """A linear model whose logits are near each other, images, and right labels."""
    x = everywhere(*shape)
    model = Affine(classes, x[0].numel())
    model.bias.data -= model(x).detach().mean(0)
    return model, x, model(x).argmax(1)


def lead(logits: Tensor, y: Tensor) -> Tensor:
    return logits.scatter(1, y[:, None], -torch.inf).amax(1) - logits.gather(1, y[:, None])[:, 0]


@pytest.mark.parametrize("eps", [0.05, 0.4])
def test_the_worst_corner_of_a_linear_model_is_found(eps: float) -> None:
    """Single pixels are what the last squares change, and a linear model needs no more."""
    model, x, _ = centred(2, (8, 3, 3, 4))
    model.bias.data[0] += 100
    y = torch.zeros(8, dtype=torch.int64)
    x_adv = Square(eps=eps, queries=1500)(model, x, y, generator=generator())
    slope = (model.weight[1] - model.weight[0]).view_as(x[:1]).expand_as(x)
    worst = lead(model(ball(Threat(Norm.linf, eps)).linear_maximiser(slope, x)), y)
    assert torch.allclose(lead(model(x_adv), y), worst, rtol=0, atol=1e-9)


def test_exactly_the_images_that_can_be_fooled_are_fooled() -> None:
    model, x, y = centred(2, (64, 1, 3, 4))
    eps = 0.04
    x_adv = Square(eps=eps, queries=1000)(model, x, y, generator=generator())
    slope = (model.weight[1 - y] - model.weight[y]).view_as(x)
    can_be = lead(model(ball(Threat(Norm.linf, eps)).linear_maximiser(slope, x)), y) > 0
    assert 10 < can_be.sum() < 54
    assert torch.equal(model(x_adv).argmax(1) != y, can_be)


@every_norm
def test_outputs_are_all_that_is_asked_for(norm: Norm) -> None:
    """Twice the smallest perturbation in linf, more where bumps are only an approximation."""
    model, x, y = centred(2, (16, 3, 6, 6))
    slope = torch.linalg.vector_norm(model.weight[1] - model.weight[0], ord=DUAL_ORDER[norm])
    share = {Norm.linf: 2, Norm.l2: 4, Norm.l1: 8}[norm]
    eps = share * (lead(model(x), y).abs() / slope).max().item()
    x_adv = Square(norm=norm, eps=eps, queries=500)(OutputsOnly(model), x, y, generator=generator())
    assert (model(x_adv).argmax(1) != y).all()


def asked(attack: Square, model: nn.Module, x: Tensor) -> list[Tensor]:
    batches: list[Tensor] = []
    keep = model.register_forward_pre_hook(lambda _, inputs: batches.append(inputs[0].clone()))
    attack(model, x, torch.zeros(len(x), dtype=torch.int64), generator=generator())
    keep.remove()
    return batches


class Constant(nn.Module):
    """Class 0 whatever the image is: every search stays at its start."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2] * 0 + torch.tensor([1.0, 0], dtype=x.dtype)


@every_norm
def test_a_query_is_one_pass(norm: Norm) -> None:
    for queries, restarts in ((1, 1), (37, 1), (37, 2)):
        attack = Square(norm=norm, eps=0.1, queries=queries, restarts=restarts, give_up=False)
        batches = asked(attack, Constant(), interior(4, 3, 8, 8))
        assert [len(batch) for batch in batches] == [4] * queries * restarts


def windows(attack: Square, x: Tensor) -> list[tuple[int, int]]:
    """Rows and columns of the windows that are tried, which are of a single sign each."""
    start, *tried = asked(attack, Constant(), x)
    shapes = []
    for points in tried:
        # A window that no image changes in any channel is not seen; the odds are 2^-24 a column.
        changed = (points != start).any(0).any(0)
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        shapes.append(tuple(int(at.max() - at.min()) + 1 for at in (rows, columns)))
        for signs in ((points - x) / attack.eps)[:, :, changed].round():
            assert all(len(channel.unique()) == 1 for channel in signs)
    return shapes


def test_linf_starts_from_stripes() -> None:
    x, eps = interior(8, 3, 16, 16), 0.1
    (start,) = asked(Square(eps=eps, queries=1), Constant(), x)
    stripes = (start - x) / eps
    assert torch.allclose(stripes.abs(), torch.ones_like(x))
    assert torch.allclose(stripes, stripes[:, :, :1].expand_as(x))
    assert len({tuple(signs) for signs in stripes[:, :, 0].round().flatten(1).tolist()}) == 8


def published(query: int, queries: int) -> float:
    """The share of the pixels after so many of the queries by the code of the authors.

    Theirs is for 5,000 queries where it does not rescale, as in AutoAttack.
    """
    return float(authors_square().p_selection(query * 5000 // queries))


@cache
def authors_square() -> Any:
    module = pytest.importorskip("pyautoattack.square")
    return module.SquareAttack(None, p_init=0.8, resc_schedule=False, device="cpu")


@pytest.mark.parametrize("queries", [71, 300])
def test_windows_of_short_searches_shrink_as_those_of_long_ones(queries: int) -> None:
    """They all have the documented sides, down to the smallest one of a search of 5,000 queries."""
    sides = [round(math.sqrt(published(query, queries) * 256)) for query in range(queries - 1)]
    assert sides[-1] == 1
    shapes = windows(Square(eps=0.1, queries=queries), interior(8, 3, 16, 16))
    assert shapes == [(side, side) for side in sides]


@pytest.mark.parametrize("queries", [1, 2, 50, 71, 2000, 5000, 10_000])
def test_the_schedule_follows_the_number_of_queries(queries: int) -> None:
    """By the code of the authors for any number, and unscaled for 5,000."""
    attack = Square(queries=queries)
    for query in range(queries - 1):
        side = max(1, round(math.sqrt(published(query, queries) * 28 * 28)))
        assert attack._side(query, 28, 28) == side


def test_windows_are_all_over_the_image() -> None:
    start, *tried = asked(
        Square(eps=0.1, queries=1500, p_init=0.05, give_up=False), Constant(), interior(8, 1, 9, 9)
    )
    touched = torch.stack([(points != start).any(0) for points in tried]).any(0)
    assert touched.all()


class Leads(nn.Module):
    """The label leads by the first pixel, relative to the spread of the logits."""

    def forward(self, x: Tensor) -> Tensor:
        lead = x.flatten(1)[:, 0]
        return torch.stack([0 * lead, -lead, 0 * lead - 1], 1)


def leads() -> Tensor:
    """Images with leads of 0.5, 0.35 and 0.2; the limits are 0.4 and 0.25."""
    lead = torch.tensor([0.5, 0.35, 0.2], dtype=torch.float64)
    return lead.view(3, 1, 1, 1).repeat(1, 1, 4, 4)


@pytest.mark.parametrize(
    ("queries", "ends"), [(5000, (1000, 2000)), (6000, (1200, 2400)), (1500, (1000,))]
)
def test_searches_that_are_far_from_success_end(queries: int, ends: tuple[int, ...]) -> None:
    sizes = [len(points) for points in asked(Square(eps=0.01, queries=queries), Leads(), leads())]
    # Each of the decisions takes one more pass, before the query after so many.
    expected, left = [], 3
    for query in range(1, queries + 1):
        if query - 2 in ends:
            expected.append(left)
            left -= 1
        expected.append(left)
    assert sizes == expected


def test_no_search_ends_where_it_is_not_to_give_up_or_short() -> None:
    for attack in (Square(eps=0.01, queries=5000, give_up=False), Square(eps=0.01, queries=1000)):
        patient = asked(attack, Leads(), leads())
        assert [len(points) for points in patient] == [3] * attack.queries


@pytest.mark.parametrize("norm", [Norm.l2, Norm.l1])
def test_bumps_spend_the_whole_radius(norm: Norm) -> None:
    x = torch.full((4, 3, 16, 16), 0.5, dtype=torch.float64)
    model = Affine(2, 768)
    model.bias.data[0] += 1000
    for points in asked(Square(norm=norm, eps=0.4, queries=40, give_up=False), model, x):
        assert torch.allclose(ball(Threat(norm, 1.0)).norm(points - x), torch.tensor(0.4).double())


@every_norm
def test_the_lead_never_falls_behind_an_earlier_query(norm: Norm) -> None:
    model, x = Affine(3, 192), interior(8, 3, 8, 8)
    model.bias.data[0] += 100
    y = torch.zeros(8, dtype=torch.int64)
    batches = asked(Square(norm=norm, eps=0.1, queries=60, give_up=False), model, x)
    best = torch.stack([lead(model(points), y) for points in batches]).amax(0)
    x_adv = Square(norm=norm, eps=0.1, queries=60, give_up=False)(
        model, x, y, generator=generator()
    )
    assert torch.equal(lead(model(x_adv), y), best)
    assert (best > lead(model(batches[0]), y)).all()


def test_the_least_likely_class_is_reached() -> None:
    model, x, y = centred(4, (16, 1, 3, 4))
    target = model(x).argmin(1)
    attack = Square(eps=0.5, queries=500, label=Label.least_likely)
    assert torch.equal(model(attack(model, x, y, generator=generator())).argmax(1), target)


@every_norm
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 3), (3, 3), (4, 7)])
def test_images_of_any_size_have_room_for_a_square(norm: Norm, shape: tuple[int, int]) -> None:
    x = everywhere(3, 2, *shape)
    model = Affine(2, x[0].numel())
    x_adv = Square(norm=norm, eps=0.2, queries=20)(model, x, torch.zeros(3).long())
    assert x_adv.isfinite().all()
    assert (ball(Threat(norm, 1.0)).norm(x_adv - x) <= 0.2 + 1e-9).all()


@pytest.mark.parametrize(
    "wrong",
    [{"queries": 0}, {"restarts": 0}, {"p_init": 0.0}, {"p_init": 1.1}, {"p_init": math.nan}],
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, float]) -> None:
    ((key, value),) = wrong.items()
    with pytest.raises(InputError, match=f"^{key}={value} "):
        Square(**wrong)
