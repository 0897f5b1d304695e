"""Multi steepest descent: in each step the best of several norms (Maini et al. 2020)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from robusttrain import ranges, seeding
from robusttrain.attacks import Loss, Traits
from robusttrain.attacks.ascent import StepRule, Walk
from robusttrain.attacks.attack_loss import AttackLoss, Label, attack_loss, cross_entropy
from robusttrain.attacks.ball_attack import check_step_size
from robusttrain.attacks.images import check_images
from robusttrain.attacks.model_view import Mode, frozen
from robusttrain.attacks.pgd import NEARBY, projected_step
from robusttrain.attacks.search_state import highest
from robusttrain.attacks.several_norms import SeveralNorms
from robusttrain.threat import of_radii
from robusttrain.threat.balls import ball


@dataclass
class MSD(SeveralNorms):
    """x_{t+1} = argmax_p L(f(z_p), y), z_p = project_p(x_t + step_p) (Maini et al. 2020, Alg. 1).

    Each step tries the steepest step of each norm from the same point, projected on the ball of
    this norm, and takes the one of the highest loss, for each image. The result lies in the union
    of the balls. With k norms a step costs a forward and a backward pass for the gradient, and k
    forward passes.

    Parameters
    ----------
    threats
        The radii of two norms or more, in pixel units of [0, 1].
    steps
        Steps, 1 or more.
    step_sizes
        Lengths of a step by norms, in pixel units; 2.5 * radius / steps for norms that are not
        there.
    random_start
        Start next to x, with a standard deviation of 0.001, instead of at x as the paper does. A
        divergence from f(x), as in `defense=trades`, has no slope at x.
    mode
        Mode of the model while crafting. Noise keeps its own.
    """

    threats: Mapping[str, float] = field(default_factory=dict)
    steps: int = 20
    step_sizes: Mapping[str, float] = field(default_factory=dict)
    random_start: bool = False
    mode: Mode = Mode.eval

    def __post_init__(self) -> None:
        ranges.at_least(1, steps=self.steps)
        ranges.one_of(list(Mode), mode=self.mode)
        self.mode = Mode(self.mode)
        self.check_threats()
        for norm, length in self.step_sizes.items():
            allowed = f"of a norm of threats: {', '.join(self.threats)}"
            ranges.require(norm in self.threats, f"step_sizes.{norm}", length, allowed)
            check_step_size(norm, length)

    # It is `Iterated`. There is no single length of a step.
    step_size = None

    def with_steps(self, steps: int, step_size: float | None = None) -> Self:
        """A copy with so many steps."""
        return replace(self, steps=steps)

    @property
    def traits(self) -> Traits:
        """What kind of an attack it is."""
        return Traits(mode=self.mode, starts_at_image=not self.random_start)

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        loss: Loss = cross_entropy,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Adversarial images for `x` (N, C, H, W) with labels `y` (N,).

        Raises
        ------
        InputError
            If `x` is not float32 or float64, or has values outside [0, 1].
        """
        check_images(x)
        with frozen(model, self.mode):
            surrogate = attack_loss(model, x, y, label=Label.given, loss=loss)
            walk = Walk.at(self._start(x, generator or seeding.fresh(x.device)), surrogate, x)
            for _ in range(self.steps):
                gradient = surrogate.evaluate(walk.x_adv).gradient
                walk.x_adv = self._step(surrogate, walk, gradient)
        return walk.x_adv.detach()

    def _start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if not self.random_start:
            return x
        smallest = ball(min(of_radii(self.threats), key=lambda threat: threat.eps))
        return smallest.project(x + torch.empty_like(x).normal_(0, NEARBY, generator=generator), x)

    def _step(self, surrogate: AttackLoss, walk: Walk, gradient: Tensor) -> Tensor:
        """The best point after the step of one norm."""
        walk.slope = gradient
        points = [rule.next_point(walk) for rule in self._rules]
        return highest(points, [surrogate.score(point)[0] for point in points])

    @property
    def _rules(self) -> list[StepRule]:
        return [
            projected_step(ball(threat), self.steps, self.step_sizes.get(threat.norm))
            for threat in of_radii(self.threats)
        ]
