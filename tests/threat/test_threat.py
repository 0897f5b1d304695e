"""Threat models against linear programming, closed forms and statistics."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq, linprog
from scipy.stats import beta, kstest
from torch import Tensor

from robusttrain.errors import InputError
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import TOLERANCE, Ball, ball, striped_start

NORMS = list(Norm)
CORNERED = [Norm.linf, Norm.l1]  # the norms whose ball is a polytope

every_norm = pytest.mark.parametrize("norm", NORMS)
seeds = st.integers(0, 2**32 - 1)
radii = st.one_of(st.just(0.0), st.floats(1e-3, 4))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int, count: int = 3, pixels: int = 6) -> Tensor:
    """Images of shape (count, 1, 1, pixels), with some pixels exactly 0 or 1."""
    values = torch.rand(count, 1, 1, pixels, generator=generator(seed), dtype=torch.float64)
    return (values * 1.6 - 0.3).clamp(0, 1)


def directions(seed: int, like: Tensor) -> Tensor:
    """Gaussian entries, some exactly 0."""
    values = torch.randn(like.shape, generator=generator(seed), dtype=like.dtype)
    return torch.where(values.abs() < 0.2, 0, values)


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def reach(
    norm: Norm, eps: float, x: NDArray[np.float64], g: NDArray[np.float64], boxed: bool
) -> float:
    """max <g, d> over |d| <= eps, and x + d in the box if `boxed`, as a linear programme.

    d = up - down with up and down not negative.
    """
    up = 1 - x if boxed else np.full_like(x, np.inf)
    down = x if boxed else np.full_like(x, np.inf)
    if norm is Norm.linf:
        up, down = np.minimum(up, eps), np.minimum(down, eps)
    bounds = list(zip(np.zeros(2 * len(x)), np.concatenate([up, down]), strict=True))
    total = {"A_ub": np.ones((1, 2 * len(x))), "b_ub": [eps]} if norm is Norm.l1 else {}
    solution = linprog(np.concatenate([-g, g]), bounds=bounds, **total)
    assert solution.success
    return float(-solution.fun)


def feasible(threat: Ball, z: Tensor, x: Tensor) -> bool:
    inside = (threat.norm(z.double() - x.double()) <= threat.eps * (1 + 1e-5) + 1e-6).all()
    return bool(inside and z.min() >= 0 and z.max() <= 1)


class TestProjection:
    @every_norm
    @given(seed=seeds, eps=radii)
    def test_is_feasible_idempotent_and_leaves_feasible_points(
        self, norm: Norm, seed: int, eps: float
    ) -> None:
        threat, x = ball(Threat(norm, eps)), images(seed)
        z = threat.project(x + directions(seed + 1, x), x)
        assert feasible(threat, z, x)
        assert torch.allclose(threat.project(z, x), z, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("norm", CORNERED)
    @given(seed=seeds, eps=radii)
    def test_is_the_nearest_point(self, norm: Norm, seed: int, eps: float) -> None:
        """z is nearest to p in a convex set if and only if no point w of it has <p - z, w - z> > 0.

        A linear programme finds the w of largest <p - z, w - x>.
        """
        threat, x = ball(Threat(norm, eps)), images(seed, count=1)
        p = x + 2 * directions(seed + 1, x)
        z = threat.project(p, x)
        outward, moved = (p - z).flatten().numpy(), (z - x).flatten().numpy()
        best = reach(norm, eps, x.flatten().numpy(), outward, boxed=True)
        assert best - outward @ moved <= 1e-9

    @pytest.mark.parametrize("eps", [0.0, 1.0, 12.0])
    def test_l1_is_exact_in_float32_from_far_away(self, eps: float) -> None:
        """The rounding of sums over thousands of pixels is visible at a small radius."""
        x, p = (torch.rand(8, 3, 32, 32, generator=generator(seed)) for seed in (0, 1))
        moved = (ball(Threat(Norm.l1, eps)).project(p, x).double() - x.double()).flatten(1)
        # Only the rounding of each pixel's own value remains.
        assert (moved.abs().sum(1) <= eps * (1 + 1e-6)).all()

    def test_l1_leaves_pixels_at_the_faces_of_the_box(self) -> None:
        """A pixel that is a rounding error away from its face would seem to be movable."""
        x, p = (torch.rand(8, 1, 8, 8, generator=generator(seed)).double() for seed in (0, 1))
        p = x + 3 * (p - x)
        z = ball(Threat(Norm.l1, 12.0)).project(p, x)
        near = torch.minimum(z, 1 - z)
        assert (near == 0).any()
        assert not ((near > 0) & (near < 1e-9)).any()

    @given(seed=seeds, eps=st.floats(1e-3, 0.5))
    def test_l2_is_radial_where_the_box_is_out_of_reach(self, seed: int, eps: float) -> None:
        x = 0.5 * torch.ones(4, 3, 2, 2, dtype=torch.float64)
        delta = directions(seed, x)
        length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        expected = x + delta * (eps / length).clamp_max(1)
        assert torch.allclose(ball(Threat(Norm.l2, eps)).project(x + delta, x), expected)

    @pytest.mark.parametrize("pixels", [784, 3072])
    @every_norm
    def test_is_feasible_for_many_pixels_in_float32(self, norm: Norm, pixels: int) -> None:
        eps = {Norm.linf: 8 / 255, Norm.l2: 0.5, Norm.l1: 12.0}[norm]
        threat, x = ball(Threat(norm, eps)), torch.rand(8, 1, 1, pixels, generator=generator(0))
        noise = torch.randn(x.shape, generator=generator(1))
        # As far outside as a step of an attack leads.
        p = x + noise * (2 * eps / threat.norm(noise)).view(-1, 1, 1, 1)
        assert feasible(threat, threat.project(p, x), x)


class TestLinearForms:
    @every_norm
    @given(seed=seeds)
    def test_the_steepest_direction_attains_the_dual_norm(self, norm: Norm, seed: int) -> None:
        threat, g = ball(Threat(norm, 1.0)), directions(seed, images(seed))
        steepest = threat.steepest(g)
        assert (threat.norm(steepest) <= 1 + 1e-12).all()
        assert torch.allclose(inner(g, steepest), threat.dual_norm(g), rtol=1e-12, atol=1e-11)

    @pytest.mark.parametrize("norm", CORNERED)
    @given(seed=seeds)
    def test_the_dual_norm_is_the_maximum_over_the_unit_ball(self, norm: Norm, seed: int) -> None:
        g = directions(seed, images(seed, count=1))
        flat = g.flatten().numpy()
        expected = reach(norm, 1.0, np.zeros_like(flat), flat, boxed=False)
        assert ball(Threat(norm, 1.0)).dual_norm(g).item() == pytest.approx(expected, abs=1e-11)

    @given(seed=seeds)
    def test_the_dual_norm_of_l2_is_l2(self, seed: int) -> None:
        g = directions(seed, images(seed))
        expected = [math.hypot(*row) for row in g.flatten(1).tolist()]
        assert ball(Threat(Norm.l2, 1.0)).dual_norm(g).tolist() == pytest.approx(
            expected, abs=1e-11
        )

    @every_norm
    @given(seed=seeds)
    def test_the_slope_of_the_dual_norm_is_the_steepest_direction(
        self, norm: Norm, seed: int
    ) -> None:
        threat = ball(Threat(norm, 1.0))
        g = torch.randn(3, 1, 2, 3, generator=generator(seed), dtype=torch.float64).requires_grad_()
        (slope,) = torch.autograd.grad(threat.dual_norm(g).sum(), g)
        assert torch.allclose(slope, threat.steepest(g.detach()), atol=1e-12)

    @every_norm
    def test_the_dual_norm_has_finite_derivatives_at_zero(self, norm: Norm) -> None:
        g = torch.zeros(2, 1, 2, 2, requires_grad=True)
        (first,) = torch.autograd.grad(
            ball(Threat(norm, 1.0)).dual_norm(g).square().sum(), g, create_graph=True
        )
        (second,) = torch.autograd.grad(first.sum(), g)
        assert first.isfinite().all()
        assert second.isfinite().all()

    @pytest.mark.parametrize("norm", CORNERED)
    @given(seed=seeds, eps=radii)
    def test_the_linear_maximiser_solves_the_linear_programme(
        self, norm: Norm, seed: int, eps: float
    ) -> None:
        threat, x = ball(Threat(norm, eps)), images(seed, count=1)
        g = directions(seed + 1, x)
        z = threat.linear_maximiser(g, x)
        assert feasible(threat, z, x)
        best = reach(norm, eps, x.flatten().numpy(), g.flatten().numpy(), boxed=True)
        assert inner(g, z - x).item() == pytest.approx(best, abs=1e-9)

    @given(seed=seeds, eps=st.floats(1e-3, 0.5))
    def test_the_l2_linear_maximiser_attains_the_dual_norm_inside_the_box(
        self, seed: int, eps: float
    ) -> None:
        threat, x = ball(Threat(Norm.l2, eps)), 0.5 * torch.ones(3, 1, 2, 2, dtype=torch.float64)
        g = directions(seed, x)
        gain = inner(g, threat.linear_maximiser(g, x) - x)
        assert torch.allclose(gain, eps * threat.dual_norm(g), atol=1e-10)

    @every_norm
    @pytest.mark.parametrize("scale", [1e-20, 1e-30, 1e-36])
    def test_a_faint_gradient_still_has_a_direction(self, norm: Norm, scale: float) -> None:
        """A logit gap of 45 gives gradients of 1e-20, whose squares are 0 in float32."""
        g = torch.tensor([[[[3.0, -2.0, 1.0]]]])
        assert torch.allclose(
            ball(Threat(norm, 1)).steepest(scale * g), ball(Threat(norm, 1)).steepest(g)
        )

    @every_norm
    def test_no_gradient_no_direction(self, norm: Norm) -> None:
        threat, x = ball(Threat(norm, 0.3)), images(0)
        zero = torch.zeros_like(x)
        assert not threat.steepest(zero).any()
        assert not threat.ascent(zero, x).any()
        assert torch.equal(threat.linear_maximiser(zero, x), x)


def shortest(norm: Norm, w: NDArray[np.float64], gain: float, x: NDArray[np.float64]) -> float:
    """min |d| over <w, d> = gain and x + d in the box: a linear programme but in l2."""
    if norm is Norm.l2:
        # By duality d = clip(m w, -x, 1 - x), with the m that gives the gain.
        def way(m: float) -> NDArray[np.float64]:
            return np.clip(m * w, -x, 1 - x)

        end = 2 / np.abs(w[w != 0]).min()
        return float(
            np.linalg.norm(way(brentq(lambda m: w @ way(m) - gain, -end, end, xtol=1e-13)))
        )
    if norm is Norm.l1:
        bounds = list(zip(np.zeros(2 * len(x)), np.concatenate([1 - x, x]), strict=True))
        equal = {"A_eq": np.concatenate([w, -w])[None], "b_eq": [gain]}
        return float(linprog(np.ones(2 * len(x)), bounds=bounds, **equal).fun)
    # The last variable bounds all moves.
    moves = np.eye(len(x), len(x) + 1)
    bound = np.eye(len(x) + 1)[-1]
    smaller = {"A_ub": np.vstack([moves, -moves]) - bound, "b_ub": np.zeros(2 * len(x))}
    equal = {"A_eq": np.append(w, 0)[None], "b_eq": [gain]}
    return float(
        linprog(bound, bounds=[*zip(-x, 1 - x, strict=True), (0, 1)], **smaller, **equal).fun
    )


def most_gain(w: Tensor, x: Tensor, sign: float) -> Tensor:
    """The largest <w, d> in the direction `sign` with x + d in the box."""
    return sign * inner(w.abs(), torch.where(sign * w > 0, 1 - x, x))


class TestShortestWay:
    @every_norm
    @given(seed=seeds, share=st.floats(1e-3, 0.999), sign=st.sampled_from([-1.0, 1.0]))
    def test_is_the_shortest_within_the_box(
        self, norm: Norm, seed: int, share: float, sign: float
    ) -> None:
        """With some pixels at faces of the box, and some zero weights."""
        threat, x = ball(Threat(norm, 0.1)), images(seed, count=1)
        w = directions(seed + 1, x)
        gain = share * most_gain(w, x, sign)
        assume(gain.item() != 0)
        d = threat.shortest_way(w, gain, x)
        assert inner(w, d).item() == pytest.approx(gain.item(), rel=1e-6)
        assert (x + d).min() >= -1e-12
        assert (x + d).max() <= 1 + 1e-12
        expected = shortest(norm, w.flatten().numpy(), gain.item(), x.flatten().numpy())
        assert threat.norm(d).item() == pytest.approx(expected, rel=1e-6)

    @every_norm
    @given(seed=seeds, excess=st.floats(1, 100), sign=st.sampled_from([-1.0, 1.0]))
    def test_goes_to_the_end_of_the_box_where_the_gain_is_out_of_reach(
        self, norm: Norm, seed: int, excess: float, sign: float
    ) -> None:
        x = images(seed)
        w = directions(seed + 1, x)
        most = most_gain(w, x, sign)
        d = ball(Threat(norm, 0.1)).shortest_way(w, excess * most, x)
        assert torch.allclose(inner(w, d), most, rtol=1e-6)
        assert (x + d).min() >= -1e-12
        assert (x + d).max() <= 1 + 1e-12

    @every_norm
    @pytest.mark.parametrize("scale", [1e-20, 1e-30, 1e-36])
    def test_faint_weights_lead_the_same_way(self, norm: Norm, scale: float) -> None:
        """The weights are gradients, as for steepest directions, and the gain is equally small."""
        threat, x = ball(Threat(norm, 0.1)), images(0).float()
        w = directions(1, x)
        gain = 0.3 * most_gain(w, x, 1)
        faint = threat.shortest_way(scale * w, scale * gain, x)
        assert torch.allclose(faint, threat.shortest_way(w, gain, x), rtol=1e-4)

    @every_norm
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 1e-20])
    def test_is_finite_and_in_the_box_where_the_weights_are_all_but_zero(
        self, norm: Norm, dtype: torch.dtype, scale: float
    ) -> None:
        x = images(0).to(dtype)
        w = torch.zeros_like(x)
        w[..., :2] = torch.tensor([1, -0.5]) * scale
        d = ball(Threat(norm, 0.1)).shortest_way(w, torch.tensor([5.0, -5, 0], dtype=dtype), x)
        assert d.isfinite().all()
        assert not d[..., 2:].any()
        assert (x + d).min() >= 0
        assert (x + d).max() <= 1

    @every_norm
    def test_has_the_same_gain_for_many_pixels_in_float32(self, norm: Norm) -> None:
        threat, x = ball(Threat(norm, 0.1)), torch.rand(4, 3, 32, 32, generator=generator(0))
        w = torch.randn(x.shape, generator=generator(1))
        gain = torch.tensor([1e-2, 1.0, -30.0, 500.0])
        d = threat.shortest_way(w, gain, x)
        assert torch.allclose(inner(w.double(), d.double()), gain.double(), rtol=1e-2, atol=0)
        exact = threat.shortest_way(w.double(), gain.double(), x.double())
        assert torch.allclose(threat.norm(d).double(), threat.norm(exact), rtol=1e-2)


class TestAscent:
    @every_norm
    @given(seed=seeds)
    def test_never_descends_and_has_norm_one_at_most(self, norm: Norm, seed: int) -> None:
        threat, x = ball(Threat(norm, 1.0)), images(seed)
        g = directions(seed + 1, x)
        step = threat.ascent(g, x)
        assert (threat.norm(step) <= 1 + 1e-12).all()
        assert (g * step >= 0).all()

    @given(seed=seeds, pixels=st.sampled_from([6, 100, 500]))
    def test_l1_never_proposes_a_pixel_that_the_box_blocks(self, seed: int, pixels: int) -> None:
        x = images(seed, pixels=pixels)
        g = directions(seed + 1, x)
        step = ball(Threat(Norm.l1, 1.0)).ascent(g, x)
        assert not ((step > 0) & (x == 1)).any()
        assert not ((step < 0) & (x == 0)).any()
        movable = ((g > 0) & (x < 1)) | ((g < 0) & (x > 0))
        expected = torch.minimum(movable.flatten(1).sum(1), torch.tensor(max(1, pixels // 100)))
        assert torch.equal((step != 0).flatten(1).sum(1), expected)
        # The steepest of the movable pixels, in equal parts.
        weakest_chosen = torch.where(step != 0, g.abs(), torch.inf).flatten(1).amin(1)
        strongest_left = torch.where(movable & (step == 0), g.abs(), 0).flatten(1).amax(1)
        assert (weakest_chosen >= strongest_left).all()

    @given(seed=seeds, counts=st.lists(st.integers(0, 60), min_size=3, max_size=3))
    def test_a_sparse_l1_step_moves_at_most_count_pixels(
        self, seed: int, counts: list[int]
    ) -> None:
        """At least one, and no pixel that the box blocks."""
        x = images(seed, pixels=50)
        g = directions(seed + 1, x)
        step = ball(Threat(Norm.l1, 1.0)).sparse_ascent(g, x, torch.tensor(counts, dtype=x.dtype))
        movable = ((g > 0) & (x < 1)) | ((g < 0) & (x > 0))
        free = movable.flatten(1).sum(1)
        moved = (step != 0).flatten(1).sum(1)
        assert torch.equal(moved, torch.minimum(free, torch.tensor(counts).clamp_min(1)))
        assert torch.allclose(ball(Threat(Norm.l1, 1.0)).norm(step), torch.ones(3).double())
        assert (g * step >= 0).all()
        weakest_chosen = torch.where(step != 0, g.abs(), torch.inf).flatten(1).amin(1)
        strongest_left = torch.where(movable & (step == 0), g.abs(), 0).flatten(1).amax(1)
        assert (weakest_chosen >= strongest_left).all()

    @pytest.mark.parametrize("norm", [Norm.linf, Norm.l2])
    def test_other_norms_have_no_sparse_steps(self, norm: Norm) -> None:
        x, threat = images(0), ball(Threat(norm, 1.0))
        g = directions(1, x)
        assert torch.equal(threat.sparse_ascent(g, x, torch.ones(3)), threat.ascent(g, x))


class TestRandomStart:
    COUNT = 4000

    def draw(self, norm: Norm, eps: float, pixels: int) -> NDArray[np.float64]:
        x = torch.full((self.COUNT, 1, 1, pixels), 0.5, dtype=torch.float64)
        delta = ball(Threat(norm, eps)).random_start(x, generator(0)) - x
        return (delta.flatten(1) / eps).numpy()

    @every_norm
    @given(seed=seeds, eps=radii)
    def test_is_feasible(self, norm: Norm, seed: int, eps: float) -> None:
        x = images(seed)
        assert feasible(
            ball(Threat(norm, eps)), ball(Threat(norm, eps)).random_start(x, generator(seed)), x
        )

    @every_norm
    @pytest.mark.parametrize("pixels", [1, 2, 9])
    def test_the_radius_is_that_of_a_uniform_point(self, norm: Norm, pixels: int) -> None:
        """The share of a ball within radius r of its centre is r^d."""
        order = {Norm.linf: np.inf, Norm.l2: 2, Norm.l1: 1}[norm]
        radius = np.linalg.norm(self.draw(norm, 0.4, pixels), ord=order, axis=1)
        assert kstest(radius**pixels, "uniform").pvalue > 1e-3

    def test_linf_pixels_are_uniform(self) -> None:
        for pixel in self.draw(Norm.linf, 0.4, 3).T:
            assert kstest(pixel, "uniform", args=(-1, 2)).pvalue > 1e-3

    def test_l2_directions_are_isotropic(self) -> None:
        """The square of one coordinate of a uniform direction is Beta(1/2, (d - 1)/2)."""
        delta = self.draw(Norm.l2, 0.4, 5)
        for pixel in (delta / np.linalg.norm(delta, axis=1, keepdims=True)).T:
            assert kstest(pixel**2, beta(0.5, 2).cdf).pvalue > 1e-3
            assert abs(np.sign(pixel).mean()) < 4 / math.sqrt(self.COUNT)

    def test_l1_shares_are_uniform_on_the_simplex(self) -> None:
        """The share of one coordinate of a uniform point of the simplex is Beta(1, d - 1)."""
        delta = self.draw(Norm.l1, 0.4, 5)
        for pixel in (delta / np.abs(delta).sum(1, keepdims=True)).T:
            assert kstest(np.abs(pixel), beta(1, 4).cdf).pvalue > 1e-3
            assert abs(np.sign(pixel).mean()) < 4 / math.sqrt(self.COUNT)

    @every_norm
    def test_depends_on_the_generator_alone(self, norm: Norm) -> None:
        x, threat = images(0), ball(Threat(norm, 0.3))
        first = threat.random_start(x, generator(5))
        torch.rand(3)
        assert torch.equal(first, threat.random_start(x, generator(5)))
        assert not torch.equal(first, threat.random_start(x, generator(6)))


# From the smallest radius in use to balls that contain the whole box.
any_radius = st.floats(math.log(1e-4), math.log(100)).map(math.exp)
shapes = st.sampled_from([(1, 1, 1), (1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 7, 5)])


def pictures(seed: int, shape: tuple[int, ...], faces: bool) -> Tensor:
    """Images in float32: with many pixels at the faces of the box, or out of reach of them."""
    values = torch.rand(4, *shape, generator=generator(seed))
    return (values * 2 - 0.5).clamp(0, 1) if faces else 0.1 + 0.8 * values


def far(seed: int, x: Tensor, scale: float) -> Tensor:
    """Gaussian perturbations, some of whose entries are exactly 0."""
    values = torch.randn(x.shape, generator=generator(seed))
    return torch.where(values.abs() < 0.2, 0, values) * scale


def overhang(norm: Norm, eps: float, z: Tensor, x: Tensor) -> float:
    """By what part of the radius images lie outside of the ball, by NumPy in float64."""
    delta = np.abs(z.numpy().astype(np.float64) - x.numpy().astype(np.float64)).reshape(len(x), -1)
    order = {Norm.linf: np.inf, Norm.l2: 2, Norm.l1: 1}[norm]
    return float((np.linalg.norm(delta, order, axis=1) / eps - 1).max())


POINTS: dict[str, Callable[[Ball, Tensor, Tensor, int], Tensor]] = {
    "project": lambda b, x, g, seed: b.project(x + g, x),
    "random_start": lambda b, x, g, seed: b.random_start(x, generator(seed)),
    "linear_maximiser": lambda b, x, g, seed: b.linear_maximiser(g, x),
    "striped_start": lambda b, x, g, seed: striped_start(b, x, generator(seed)),
}


class TestRoundingToFloat32:
    @pytest.mark.parametrize("point", POINTS)
    @every_norm
    @settings(max_examples=100)
    @given(
        seed=seeds,
        eps=any_radius,
        shape=shapes,
        faces=st.booleans(),
        scale=st.sampled_from([1e-5, 1e-2, 1.0, 1e3]),
    )
    def test_leaves_every_point_in_the_box_and_in_the_ball(
        self, point: str, norm: Norm, seed: int, eps: float, shape: tuple[int, ...], faces: bool,
        scale: float,
    ) -> None:  # fmt: skip
        x = pictures(seed, shape, faces)
        z = POINTS[point](ball(Threat(norm, eps)), x, far(seed + 1, x, scale), seed)
        assert overhang(norm, eps, z, x) <= TOLERANCE
        assert z.min() >= 0
        assert z.max() <= 1
        assert (z.dtype, z.shape) == (x.dtype, x.shape)

    @pytest.mark.parametrize("point", POINTS)
    @pytest.mark.parametrize("scale", [1e-2, 1e3])
    @pytest.mark.parametrize("eps", [1e-4, 0.1, 3.0, 100.0])
    @every_norm
    def test_leaves_every_point_of_a_large_image_in_the_ball(
        self, norm: Norm, eps: float, scale: float, point: str
    ) -> None:
        for faces in (False, True):
            x = pictures(0, (3, 224, 224), faces)
            z = POINTS[point](ball(Threat(norm, eps)), x, far(1, x, scale), 2)
            assert overhang(norm, eps, z, x) <= TOLERANCE

    @pytest.mark.parametrize("point", ["project", "linear_maximiser"])
    @given(seed=seeds, eps=any_radius, faces=st.booleans())
    def test_costs_no_more_than_its_last_digit(
        self, point: str, seed: int, eps: float, faces: bool
    ) -> None:
        """In linf every pixel ends within a step of float32 from where it would exactly."""
        x, threat = pictures(seed, (1, 8, 8), faces), ball(Threat(Norm.linf, eps))
        g = far(seed + 1, x, 1e3)
        exact = (x.double() + eps * g.sign()).clamp(0, 1)
        assert (POINTS[point](threat, x, g, 0) - exact).abs().max() <= 2**-24 + 1e-6 * eps

    @given(
        seed=seeds, eps=st.floats(math.log(0.03), math.log(4)).map(math.exp), faces=st.booleans()
    )
    def test_changes_no_bit_where_the_radius_is_usual(
        self, seed: int, eps: float, faces: bool
    ) -> None:
        x = pictures(seed, (3, 32, 32), faces)
        g = far(seed + 1, x, 1.0)
        plain = torch.clamp(x + g, x - eps, x + eps).clamp(0, 1)
        assert torch.equal(ball(Threat(Norm.linf, eps)).project(x + g, x), plain)
        radius = max(0.1, eps)
        delta = (x + g) - x
        shrink = (radius / torch.linalg.vector_norm(delta.flatten(1), dim=1)).clamp_max(1)
        plain = (x + delta * shrink.view(-1, 1, 1, 1)).clamp(0, 1)
        assert torch.equal(ball(Threat(Norm.l2, radius)).project(x + g, x), plain)

    def test_l1_gives_up_what_pixels_at_their_faces_have_too_much(self) -> None:
        """From far away the threshold is rounded, and no pixel but those at their faces moves."""
        x = torch.rand(8, 3, 224, 224, generator=generator(0)) * 0.8 + 0.1
        p = x + 1e3 * torch.randn(x.shape, generator=generator(1))
        assert overhang(Norm.l1, 3.0, ball(Threat(Norm.l1, 3.0)).project(p, x), x) <= TOLERANCE


@every_norm
@given(seed=seeds, eps=radii)
def test_a_striped_start_is_feasible_and_drawn_from_the_generator_alone(
    norm: Norm, seed: int, eps: float
) -> None:
    x, threat = images(seed), ball(Threat(norm, eps))
    start = striped_start(threat, x, generator(seed))
    assert feasible(threat, start, x)
    assert torch.equal(start, striped_start(threat, x, generator(seed)))


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=seeds)
def test_eps_zero_returns_the_images(norm: Norm, dtype: torch.dtype, seed: int) -> None:
    threat, x = ball(Threat(norm, 0)), images(seed).to(dtype)
    g = directions(seed + 1, x)
    assert torch.equal(threat.project(x + g, x), x)
    assert torch.equal(threat.linear_maximiser(g, x), x)
    assert torch.equal(threat.random_start(x, generator(seed)), x)


@every_norm
@pytest.mark.parametrize("eps", [-1e-9, -1.0, math.nan, math.inf, -math.inf])
def test_an_impossible_radius_is_refused_by_name(norm: Norm, eps: float) -> None:
    with pytest.raises(InputError, match=f"^eps={eps} .*0 or more$"):
        ball(Threat(norm, eps))


@every_norm
@given(seed=seeds, eps=st.floats(1e-3, 2))
def test_each_image_has_its_own_ball(norm: Norm, seed: int, eps: float) -> None:
    threat, x = ball(Threat(norm, eps)), images(seed)
    g = directions(seed + 1, x)
    whole = (threat.project(x + g, x), threat.linear_maximiser(g, x), threat.ascent(g, x))
    for i in range(len(x)):
        row = slice(i, i + 1)
        alone = (
            threat.project(x[row] + g[row], x[row]),
            threat.linear_maximiser(g[row], x[row]),
            threat.ascent(g[row], x[row]),
        )
        for one, many in zip(alone, whole, strict=True):
            assert torch.allclose(one, many[row], rtol=0, atol=1e-12)


def test_norms_of_known_vectors() -> None:
    delta = torch.tensor([[[[3.0, -4.0]]], [[[0.0, 0.5]]]])
    assert ball(Threat(Norm.linf, 1)).norm(delta).tolist() == [4, 0.5]
    assert ball(Threat(Norm.l2, 1)).norm(delta).tolist() == [5, 0.5]
    assert ball(Threat(Norm.l1, 1)).norm(delta).tolist() == [7, 0.5]


# --- a threat as a value -------------------------------------------------------------------------


def test_a_threat_is_a_value() -> None:
    threat = Threat("linf", 0.03)  # type: ignore[arg-type]
    assert threat == Threat(Norm.linf, 0.03)
    assert len({threat, Threat(Norm.linf, 0.03), Threat(Norm.l2, 0.03)}) == 2
    assert str(threat) == "linf, eps 0.03"
    assert threat.at(0.5) == Threat(Norm.linf, 0.5)


@pytest.mark.parametrize("norm", Norm)
@pytest.mark.parametrize("other", Norm)
@pytest.mark.parametrize("eps", [0.1, 0.3, 0.5])
def test_a_threat_covers_what_lies_in_its_ball(norm: Norm, other: Norm, eps: float) -> None:
    """The extreme points of a ball, relative to another: one pixel changes, or all of them."""
    corner = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    rays = torch.cat([corner, torch.ones(1, 4, dtype=torch.float64)])
    rays = rays * 0.3 / ball(Threat(norm, 1.0)).norm(rays)[:, None]
    lies_inside = bool((ball(Threat(other, 1.0)).norm(rays) <= eps + 1e-12).all())
    assert Threat(other, eps).covers(Threat(norm, 0.3)) is lies_inside


@pytest.mark.parametrize(("norm", "eps", "key"), [("l3", 0.1, "norm"), ("l2", -0.1, "eps")])
def test_an_impossible_threat_is_refused_by_name(norm: str, eps: float, key: str) -> None:
    with pytest.raises(InputError, match=f"^{key}="):
        Threat(norm, eps)  # type: ignore[arg-type]
