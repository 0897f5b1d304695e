"""The exact margin in a branch in which the network is affine."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, linprog, minimize
from torch import Tensor

from robusttrain.bounds.inputs import InputSet
from robusttrain.threat import Norm

Array = NDArray[np.float64]

# Iterations for the multipliers of an l2 ball.
ITERATIONS = 500


class Leaf(NamedTuple):
    """min <slope, z> + shift over the z in S(x) with rows z + heights >= 0, all in float64.

    `slope` (D,), `rows` (R, D), `heights` (R,).
    """

    inputs: InputSet
    slope: Tensor
    shift: float
    rows: Tensor
    heights: Tensor

    def solve(self) -> tuple[float, Tensor]:
        """A lower bound, and a point (1, C, H, W) near which the minimum is; inf for an empty set.

        In linf and l1 a linear program finds multipliers of the conditions, and in l2 L-BFGS-B
        does. The bound is computed from the multipliers, and holds whichever they are. That the set
        is empty is the word of the solver, whose tolerance is 1e-7.
        """
        if self.inputs.threat.norm == Norm.l2:
            multipliers, point = self._ascended(), None
        else:
            found = self._program()
            if found is None:
                return np.inf, self.inputs.x
            multipliers, point = found
        bound, near, _ = self._dual(multipliers)
        return bound, near if point is None else point

    def _dual(self, multipliers: Array) -> tuple[float, Tensor, Array]:
        """The least value of the Lagrange function, its point, and the conditions there."""
        weights = torch.as_tensor(multipliers).to(self.rows)
        slope = (self.slope - weights @ self.rows).view(1, *self.inputs.x.shape)
        bound = self.inputs.minimum(slope) + self.shift - weights @ self.heights
        point = self.inputs.minimiser(slope)[0]
        conditions = self.rows @ point.flatten() + self.heights
        return float(bound), point, conditions.cpu().numpy()

    def _ascended(self) -> Array:
        """Multipliers of the conditions with a large dual value."""
        if not len(self.rows):
            return np.zeros(0)

        def descent(multipliers: Array) -> tuple[float, Array]:
            bound, _, conditions = self._dual(multipliers)
            return -bound, conditions

        start = np.zeros(len(self.rows))
        found: Any = minimize(
            descent,
            start,
            jac=True,
            bounds=Bounds(lb=0),
            method="L-BFGS-B",
            options={"maxiter": ITERATIONS},
        )
        multipliers: Array = np.maximum(found.x, 0)
        return multipliers

    def _program(self) -> tuple[Array, Tensor] | None:
        """The multipliers and the point of the linear program; None if no point is feasible."""
        x = self.inputs.x
        box = self.inputs.box
        low, high = (end.flatten().cpu().numpy() for end in (box.lower, box.upper))
        slope, rows, heights = (
            part.cpu().numpy() for part in (self.slope, self.rows, self.heights)
        )
        sides, cap = -rows, heights
        ends = np.stack([low, high], 1)
        if self.inputs.threat.norm == Norm.l1:
            slope, sides, cap, ends = self._with_lengths(slope, sides, cap, ends)
        found: Any = linprog(slope, sides, cap, bounds=ends.tolist(), method="highs")
        if found.status == INFEASIBLE:
            return None
        if found.x is None:
            return np.zeros(len(heights)), x
        point = torch.as_tensor(found.x[: x.numel()]).to(x).view_as(x)
        return np.maximum(-found.ineqlin.marginals[: len(heights)], 0), point

    def _with_lengths(
        self, slope: Array, sides: Array, cap: Array, ends: Array
    ) -> tuple[Array, Array, Array, Array]:
        """The program with a variable for each |z_i - x_i|, whose sum is at most eps."""
        x = self.inputs.x.flatten().cpu().numpy()
        count = len(x)
        one = np.eye(count)
        longer = np.block([[one, -one], [-one, -one], [np.zeros((1, count)), np.ones((1, count))]])
        sides = np.vstack([np.hstack([sides, np.zeros_like(sides)]), longer])
        cap = np.concatenate([cap, x, -x, [self.inputs.threat.eps]])
        lengths = np.tile([0.0, np.inf], (count, 1))
        return np.concatenate([slope, np.zeros(count)]), sides, cap, np.vstack([ends, lengths])


# The status of `linprog` for a program without a feasible point.
INFEASIBLE = 2
