"""APGD against a plain reference in NumPy and closed forms on linear models; its losses by hand."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from robusttrain.attacks.apgd import APGD, RULES, SearchStart
from robusttrain.attacks.attack_loss import Label, cross_entropy
from robusttrain.attacks.objectives import (
    AttackObjective,
    dlr,
    margin,
    targeted_dlr,
    targeted_margin,
)
from robusttrain.errors import InputError
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.attacks import (
    Affine,
    OnFirstPixel,
    everywhere,
    generator,
    interior,
    loss_gradient,
    misleading,
    pixel_images,
    reference_projection,
    reference_step,
    tanh_network,
)

Array = NDArray[np.float64]
every_norm = pytest.mark.parametrize("norm", list(Norm))


def checkpoints(steps: int) -> list[int]:
    """w_j = p_j * steps with p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), in hundredths."""
    p = [0, 22]
    while p[-1] <= 100:
        p.append(p[-1] + max(p[-1] - p[-2] - 3, 6))
    return [p_j * steps // 100 for p_j in p if p_j <= 100]


def logits_of(network: nn.Module, x: Array) -> Array:
    w1, b1, w2, b2 = (parameter.detach().numpy() for parameter in network.parameters())
    logits: Array = w2 @ np.tanh(w1 @ x + b1) + b2
    return logits


def reference(  # noqa: C901 - one loop, as in the paper
    network: nn.Module, norm: Norm, eps: float, steps: int, x: Array, start: Array, y: int
) -> tuple[Array, int, bool]:
    """Algorithm 1 for one image: the point, how often the step was halved, whether it fooled."""

    def value(z: Array) -> float:
        logits = logits_of(network, z)
        return float(np.log(np.exp(logits - logits[y]).sum()))

    def project(z: Array) -> Array:
        return reference_projection(norm, z, x, eps)

    def fools(z: Array) -> bool:
        return bool(logits_of(network, z).argmax() != y)

    w, step, halvings, halved = checkpoints(steps), 2 * eps, 0, False
    previous, current, values = start, start, [value(start)]
    best, best_value, best_reviewed = start, values[0], values[0]
    for k in range(1, steps + 1):
        if fools(current):
            return current, halvings, True
        step_direction = reference_step(norm, loss_gradient(network, current, y), current)
        z = project(current + step * step_direction)
        if k > 1:
            z = project(current + 0.75 * (z - current) + 0.25 * (current - previous))
        previous, current = current, z
        values.append(value(z))
        if values[-1] > best_value:
            best, best_value = z, values[-1]
        if k in w and not fools(z):
            since = k - w[w.index(k) - 1]
            rises = sum(after > before for before, after in pairwise(values[-since - 1 :]))
            halved = rises <= 0.75 * since or (not halved and best_value == best_reviewed)
            if halved:
                step, current, halvings = step / 2, best, halvings + 1
            best_reviewed = best_value
    return (current, halvings, True) if fools(current) else (best, halvings, False)


@pytest.mark.parametrize("steps", [100, 200])
@pytest.mark.parametrize(("norm", "eps"), [(Norm.linf, 0.02), (Norm.l2, 0.12)])
def test_iterates_are_those_of_the_plain_reference(norm: Norm, eps: float, steps: int) -> None:
    network, x = tanh_network(48, 3), everywhere(24, 3, 4, 4)
    y = network(x).argmax(1)
    x_adv = APGD(norm=norm, eps=eps, steps=steps)(network, x, y, generator=generator(3))
    start = ball(Threat(norm, eps)).random_start(x, generator(3))
    outcomes = []
    for i in range(len(x)):
        flat = (x[i].flatten().numpy(), start[i].flatten().numpy())
        expected, *outcome = reference(network, norm, eps, steps, *flat, int(y[i]))
        assert np.allclose(x_adv[i].flatten().numpy(), expected, rtol=0, atol=1e-9)
        outcomes.append(outcome)
    # The comparison has seen halved steps and both ends of a search.
    assert {fooled for _, fooled in outcomes} == {True, False}
    assert max(halvings for halvings, _ in outcomes) >= 4


def test_reviews_are_those_of_the_paper() -> None:
    """Croce and Hein 2020, section 3.1: more and more often."""
    expected = [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(100)[1:] == expected
    reviews = RULES[Norm.linf](ball(Threat(Norm.linf, 0.1)), 100, 0.75).reviews()
    assert list(reviews) == expected
    assert list(reviews.values()) == [after - before for before, after in pairwise([0, *expected])]


EPS = {Norm.linf: 0.05, Norm.l2: 0.1, Norm.l1: 0.2}
DUAL_ORDER = {Norm.linf: 1, Norm.l2: 2, Norm.l1: float("inf")}


def leads(logits: Tensor) -> Tensor:
    """Of class 1 over class 0."""
    return logits[:, 1] - logits[:, 0]


def sure_of_class_0() -> tuple[Affine, Tensor]:
    """A linear model and labels that no perturbation here reaches past."""
    model = Affine(2, 48)
    model.bias.data += torch.tensor([50.0, 0])
    return model, torch.zeros(8, dtype=torch.int64)


# With cross-entropy, the loss of a class that is 50 logits behind would be rounded to zero.
@pytest.mark.parametrize("keys", [{"objective": "margin"}, {"objective": "margin", "targets": 1}])
@every_norm
def test_the_worst_case_of_a_linear_model_is_reached(norm: Norm, keys: dict[str, object]) -> None:
    (model, y), x = sure_of_class_0(), interior(8, 3, 4, 4)
    attack = APGD(norm=norm, eps=EPS[norm], **keys)
    reached = leads(model(attack(model, x, y, generator=generator())))
    slope = torch.linalg.vector_norm(model.weight[1] - model.weight[0], ord=DUAL_ORDER[norm])
    assert torch.allclose(reached, leads(model(x)) + EPS[norm] * slope, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("norm", "eps"), [(Norm.linf, 0.3), (Norm.linf, 1.0), (Norm.l1, 2.0), (Norm.l1, 12.0)]
)
def test_the_worst_case_with_an_active_box_is_reached(norm: Norm, eps: float) -> None:
    (model, y), x = sure_of_class_0(), everywhere(8, 3, 4, 4)
    slope = (model.weight[1] - model.weight[0]).view_as(x[:1]).expand_as(x)
    worst = leads(model(ball(Threat(norm, eps)).linear_maximiser(slope, x)))
    attack = APGD(norm=norm, eps=eps, objective=AttackObjective.margin)
    reached = leads(model(attack(model, x, y, generator=generator())))
    # The l1 step never gets shorter than a tenth of the radius, so that it ends close by.
    short = 2e-2 if norm is Norm.l1 else 1e-9
    assert (reached <= worst + 1e-9).all()
    assert (reached - leads(model(x)) >= (1 - short) * (worst - leads(model(x)))).all()


@every_norm
def test_exactly_the_images_that_can_be_fooled_are_fooled(norm: Norm) -> None:
    model, x, eps = Affine(2, 12), interior(64, 1, 3, 4), 0.4 * EPS[norm]
    model.bias.data[0] += leads(model(x)).mean()
    y = model(x).argmax(1)
    x_adv = APGD(norm=norm, eps=eps)(model, x, y, generator=generator())
    slope = torch.linalg.vector_norm(model.weight[1] - model.weight[0], ord=DUAL_ORDER[norm])
    can_be = leads(model(x)).abs() < eps * slope
    assert 0 < can_be.sum() < len(x)
    assert torch.equal(model(x_adv).argmax(1) != y, can_be)


def asked(attack: APGD, model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The batches that the model is asked about."""
    batches: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: batches.append(inputs[0].detach()))
    attack(model, x, y, generator=generator())
    return batches


def test_l1_comes_from_larger_balls() -> None:
    """30 % of the steps in 3 eps, 30 % in 2 eps, 40 % in eps, and the start of each."""
    (model, y), x = sure_of_class_0(), interior(8, 3, 4, 4)
    attack = APGD(norm=Norm.l1, eps=1.0, steps=10, restarts=1, objective=AttackObjective.margin)
    largest = [
        (points - x).flatten(1).norm(p=1, dim=1).max() for points in asked(attack, model, x, y)
    ]
    assert len(largest) == 13
    stages = [max(stage) for stage in (largest[:4], largest[4:8], largest[8:])]
    assert stages == pytest.approx([3, 2, 1])


@every_norm
def test_l1_alone_pays_for_its_stages(norm: Norm) -> None:
    (model, y), x = sure_of_class_0(), interior(8, 3, 4, 4)
    attack = APGD(
        norm=norm, eps=0.1, steps=10, restarts=3, targets=1, objective=AttackObjective.margin
    )
    # One more pass ranks the targets.
    assert len(asked(attack, model, x, y)) == 1 + 3 * (13 if norm is Norm.l1 else 11)


def test_more_restarts_never_fool_fewer() -> None:
    model, (x, y) = OnFirstPixel(misleading), pixel_images(64)
    fooled = []
    for restarts in (1, 2, 3, 20):
        attack = APGD(eps=0.3, steps=5, restarts=restarts)
        fooled.append(model(attack(model, x, y, generator=generator())).argmax(1) != 0)
    assert 0 < fooled[0].sum() < 64
    assert fooled[-1].all()
    for fewer, more in pairwise(fooled):
        assert (fewer <= more).all()


@pytest.mark.parametrize("objective", list(AttackObjective))
def test_the_target_that_can_be_reached_is_found_among_the_others(
    objective: AttackObjective,
) -> None:
    """The third class of the ranking wins far on the left; the first two lead to the right."""

    def logits(t: Tensor) -> list[Tensor]:
        return [0 * t, 0.2 * t - 0.1, 0.2 * t - 0.2, -3 * t - 0.8]

    model, (x, y) = OnFirstPixel(logits), pixel_images(64)
    found = []
    for targets in (2, 3):
        attack = APGD(eps=0.3, steps=5, targets=targets, objective=objective)
        found.append((model(attack(model, x, y, generator=generator())).argmax(1) != 0).sum())
    assert found[0] < 20
    assert found[1] == 64


@pytest.mark.parametrize("keys", [{"objective": "margin"}, {"objective": "dlr"}, {"targets": 1}])
def test_a_loss_of_the_defense_is_not_replaced_in_silence(keys: dict[str, object]) -> None:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(logits, y)

    model, x = Affine(4, 12), interior(2, 1, 3, 4)
    with pytest.raises(InputError, match=r"^objective="):
        APGD(**keys)(model, x, torch.tensor([0, 1]), loss=loss)


LOGITS = torch.tensor([[3.0, 1.0, 0.5, -1.0]])


class TestObjectives:
    @pytest.mark.parametrize(
        ("y", "lead", "ratio"), [(0, -2, -2 / 2.5), (1, 2, 2 / 2.5), (3, 4, 4 / 2.5)]
    )
    def test_untargeted_losses_are_those_of_the_paper(
        self, y: int, lead: float, ratio: float
    ) -> None:
        assert margin(LOGITS, torch.tensor([y])).item() == pytest.approx(lead)
        assert dlr(LOGITS, torch.tensor([y])).item() == pytest.approx(ratio)

    @pytest.mark.parametrize(("y", "target", "lead"), [(0, 2, -2.5), (1, 0, 2), (3, 2, 1.5)])
    def test_targeted_losses_are_those_of_the_paper(self, y: int, target: int, lead: float) -> None:
        """The spread is 3 - (0.5 - 1) / 2 = 3.25."""
        at = (LOGITS, torch.tensor([y]), torch.tensor([target]))
        assert targeted_margin(*at).item() == pytest.approx(lead)
        assert targeted_dlr(*at).item() == pytest.approx(lead / 3.25)

    @given(
        seed=st.integers(0, 1000),
        classes=st.integers(4, 10),
        scale=st.floats(1e-3, 1e3),
        shift=st.floats(-100, 100),
    )
    def test_dlr_does_not_see_the_scale_and_the_shift_of_the_logits(
        self, seed: int, classes: int, scale: float, shift: float
    ) -> None:
        logits = torch.randn(5, classes, generator=generator(seed), dtype=torch.float64)
        y = torch.arange(5) % classes
        for loss in (dlr, partial(targeted_dlr, target=(y + 1) % classes)):
            assert torch.allclose(loss(scale * logits + shift, y), loss(logits, y), atol=1e-5)

    def test_equal_logits_have_a_finite_loss(self) -> None:
        equal, y = torch.zeros(1, 4), torch.tensor([1])
        assert dlr(equal, y).item() == 0
        assert targeted_dlr(equal, y, torch.tensor([2])).item() == 0


class TestFewClasses:
    @pytest.mark.parametrize(
        ("classes", "targets", "objective"),
        [(2, 1, "margin"), (3, 2, "margin"), (4, 3, "dlr"), (10, 9, "dlr"), (100, 9, "dlr")],
    )
    def test_targets_and_their_dlr_are_cut(
        self, classes: int, targets: int, objective: str
    ) -> None:
        attack = APGD(targets=9, objective=AttackObjective.dlr, steps=7)
        assert attack.fitted(classes) == APGD(targets=targets, objective=objective, steps=7)

    @pytest.mark.parametrize(("classes", "objective"), [(2, "margin"), (3, "dlr"), (10, "dlr")])
    def test_dlr_needs_three_classes(self, classes: int, objective: str) -> None:
        assert APGD(objective=AttackObjective.dlr).fitted(classes) == APGD(objective=objective)

    @pytest.mark.parametrize("objective", list(AttackObjective))
    @pytest.mark.parametrize("targets", [None, 9])
    @pytest.mark.parametrize("classes", [2, 3, 4, 5])
    def test_a_fitted_attack_runs(
        self, classes: int, targets: int | None, objective: AttackObjective
    ) -> None:
        model, x = Affine(classes, 12), interior(16, 1, 3, 4)
        y = model(x).argmax(1)
        attack = APGD(eps=0.5, targets=targets, objective=objective, steps=20).fitted(classes)
        assert (model(attack(model, x, y, generator=generator())).argmax(1) != y).all()


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"restarts": 0}, {"rho": 0.0}, {"rho": 1.0}, {"rho": math.nan}]
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, float]) -> None:
    ((key, value),) = wrong.items()
    with pytest.raises(InputError, match=f"^{key}={value} "):
        APGD(**wrong)


def test_impossible_aims_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"^targets=0 "):
        APGD(targets=0)
    with pytest.raises(InputError, match=r"^objective=sideways "):
        APGD(objective="sideways")
    allowed = r"^label=least_likely .* given or predicted "
    with pytest.raises(InputError, match=allowed):
        APGD(targets=1, label=Label.least_likely)


def test_an_l1_search_starts_with_few_pixels_changed() -> None:
    """A start that changes all pixels a little stays dense, and ends far above the reference's."""
    seen: list[Tensor] = []
    model = tanh_network(784, 4)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    x = everywhere(6, 1, 28, 28)
    APGD(norm=Norm.l1, eps=10, steps=5)(model, x, torch.zeros(6, dtype=torch.int64))
    assert ((seen[0] != x).flatten(1).double().mean(1) < 0.2).all()


class Watched(nn.Module):
    """Never fooled: the label leads by 1 or by 8 tenths of the spread, as the first pixel says."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.points.append(x.detach().clone())
        far = (x[:, 0, 0, 0] > 0.5).to(x.dtype)
        slope = 1e-6 * x.flatten(1).sum(1)
        return torch.stack([1 + slope, 0.9 - 0.7 * far, 0 * far], 1)


def watched_images() -> Tensor:
    x = 0.4 + 0.01 * everywhere(6, 2, 5, 7)
    x[:2, 0, 0, 0] = 0.8
    return x


def starts_of(attack: APGD, model: Watched, x: Tensor) -> list[Tensor]:
    """Where each search of a single step began, as seen from the images."""
    attack(model, x, torch.zeros(len(x), dtype=torch.int64))
    return [points - x for points in model.points[::2]]


def test_searches_start_from_stripes_at_the_edge_in_turn() -> None:
    x = watched_images()
    for norm in (Norm.linf, Norm.l2):
        attack = APGD(
            norm=norm,
            eps=0.1,
            steps=1,
            restarts=4,
            starts=[SearchStart.random, SearchStart.stripes],
        )
        starts = starts_of(attack, Watched(), x)
        for number, delta in enumerate(starts):
            shared = torch.allclose(delta, delta[..., :1, :].expand_as(delta), atol=1e-7)
            assert shared is (number % 2 == 1)
        striped = starts[1]
        assert torch.allclose(
            ball(Threat(norm, 0)).norm(striped), torch.tensor(0.1).to(x), atol=1e-6
        )
        assert torch.allclose(striped.abs(), striped.abs().amax((1, 2, 3), keepdim=True))
        # One sign a column and channel, drawn for every image and search anew.
        assert not torch.equal(striped.sign(), starts[3].sign())
        assert not torch.equal(striped[2].sign(), striped[3].sign())


@pytest.mark.parametrize("norm", [Norm.linf, Norm.l2])
def test_a_search_from_outside_goes_through_halved_balls(norm: Norm) -> None:
    x = interior(8, 3, 4, 4)
    attack = APGD(norm=norm, eps=0.01, steps=10, starts=[SearchStart.outside])
    model = Watched()
    attack(model, x, torch.zeros(8, dtype=torch.int64))
    sizes = [float(ball(Threat(norm, 0)).norm(points - x).max()) for points in model.points]
    # Two steps in each larger ball, four in the last one, and a look at where each begins.
    stages = [max(sizes[first:last]) for first, last in pairwise((0, 3, 6, 9, 14))]
    assert len(sizes) == 14
    assert stages == pytest.approx([0.08, 0.04, 0.02, 0.01], rel=1e-4)


def walled(t: Tensor) -> list[Tensor]:
    """Class 1 wins beyond 0.3 on either side, and nothing within 0.25 leads there."""
    return [0.5 + 0 * t, 0.4 + 2 * (t.abs() - 0.25).clamp_min(0), 0 * t]


def test_from_outside_it_gets_past_a_flat_gradient() -> None:
    model, (x, y) = OnFirstPixel(walled), pixel_images(16)
    near, outside = (
        APGD(norm=Norm.l2, eps=0.35, steps=50, restarts=3, starts=[start])(
            model, x, y, generator=generator()
        )
        for start in (SearchStart.random, SearchStart.outside)
    )
    assert (model(near).argmax(1) == 0).any()
    assert (model(outside).argmax(1) == 1).all()


def test_an_image_that_is_far_from_success_gets_one_search_where_that_is_asked_for() -> None:
    x, y, model = watched_images(), torch.zeros(6, dtype=torch.int64), Watched()
    APGD(eps=0.1, steps=3, restarts=5, far=0.2)(model, x, y)
    # A search of three steps looks at four points, and all who were searched at one more.
    assert [len(point) for point in model.points] == [6] * 5 + [4] * 5 * 4


def test_searches_that_end_alike_are_given_up() -> None:
    """The margins of `Watched` differ by the faint slope alone, which is no hope of success."""
    x, y, model = watched_images(), torch.zeros(6, dtype=torch.int64), Watched()
    APGD(eps=0.1, steps=3, restarts=9, give_up=True)(model, x, y)
    assert [len(point) for point in model.points] == [6] * 5 * 3


def lucky(t: Tensor) -> list[Tensor]:
    """Class 1 wins within 0.02 of t = 0, which only a start can hit; gradients lead to the edge."""
    return [1 + 0 * t, 1.02 - t.detach().abs() + 1e-6 * t, 0 * t]


def test_searches_that_differ_go_on_until_one_succeeds() -> None:
    model, (x, y) = OnFirstPixel(lucky), pixel_images(16)
    x = x + 0.1
    attack = APGD(eps=0.3, steps=1, restarts=200, give_up=True)
    found = model(attack(model, x, y, generator=generator())).argmax(1) == 1
    # Three searches may end alike by chance.
    assert found.sum() >= 13
