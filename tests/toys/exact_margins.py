"""The least margins of small ReLU networks over a ball, by mixed-integer programming."""

from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from robusttrain.threat import Norm, Threat

Array = NDArray[np.float64]

# What the bounds of a ReLU's argument are widened by. HiGHS ends in an error if it is as small as
# its own tolerance, 1e-6.
SLACK = 1e-4


class Affine(NamedTuple):
    """weight z + bias, of all layers between two ReLUs."""

    weight: Array
    bias: Array


def affine_parts(model: nn.Sequential, shape: tuple[int, ...]) -> list[Affine]:
    """The affine functions between the ReLUs of `model`, for images of `shape`."""
    parts, z = [], torch.zeros(1, *shape, dtype=torch.float64)
    for is_relu, layers in groupby(model, lambda layer: isinstance(layer, nn.ReLU)):
        if is_relu:
            continue
        block = nn.Sequential(*layers)
        out = block(z)
        weight = torch.autograd.functional.jacobian(block, z).reshape(out.numel(), z.numel())
        bias = out - (weight @ z.flatten()).view_as(out)
        parts.append(Affine(weight.numpy(), bias.detach().flatten().numpy()))
        z = torch.zeros_like(out)
    return parts


def least_margin(parts: list[Affine], x: Tensor, y: int, k: int, threat: Threat) -> float:
    """min over S(x) of f_y - f_k, for one image, in linf or l1."""
    low, high = _box(x, threat)
    columns, rows, sides = low.size, [], []
    lowest, highest = [low], [high]
    whole = [np.zeros(low.size)]
    before = slice(0, low.size)
    if threat.norm == Norm.l1:
        # A variable for |z - x| of each pixel.
        count = low.size
        moved = slice(count, 2 * count)
        start = x.flatten().numpy()
        for pixel in range(count):
            for sign in (1, -1):
                rows.append({pixel: sign, count + pixel: -1})
                sides.append(sign * start[pixel])
        rows.append(dict.fromkeys(range(moved.start, moved.stop), 1.0))
        sides.append(threat.eps)
        lowest.append(np.zeros(count))
        highest.append(np.full(count, np.inf))
        whole.append(np.zeros(count))
        columns += count
    for weight, bias in parts[:-1]:
        centre, radius = (low + high) / 2, (high - low) / 2
        down = weight @ centre + bias - np.abs(weight) @ radius - SLACK
        up = weight @ centre + bias + np.abs(weight) @ radius + SLACK
        for unit, (line, shift) in enumerate(zip(weight, bias, strict=True)):
            h, on = columns + unit, columns + len(bias) + unit
            z = dict(zip(range(before.start, before.stop), line, strict=True))
            least, most = min(down[unit], 0), max(up[unit], 0)
            rows += [{**z, h: -1.0}, {**_minus(z), h: 1.0, on: -least}, {h: 1.0, on: -most}]
            sides += [-shift, shift - least, 0.0]
        before = slice(columns, columns + len(bias))
        columns += 2 * len(bias)
        low, high = np.maximum(down, 0), np.maximum(up, 0)
        lowest += [np.zeros(len(bias)), np.zeros(len(bias))]
        highest += [high, np.ones(len(bias))]
        whole += [np.zeros(len(bias)), np.ones(len(bias))]
    weight, bias = parts[-1]
    cost = np.zeros(columns)
    cost[before] = weight[y] - weight[k]
    matrix = np.zeros((len(rows), columns))
    for row, entries in enumerate(rows):
        matrix[row, list(entries)] = list(entries.values())
    limits = [LinearConstraint(matrix, -np.inf, np.array(sides))] if rows else []
    found = milp(
        cost,
        integrality=np.concatenate(whole),
        bounds=Bounds(np.concatenate(lowest), np.concatenate(highest)),
        constraints=limits,
    )
    assert found.success, found.message
    return float(found.fun + bias[y] - bias[k])


def _box(x: Tensor, threat: Threat) -> tuple[Array, Array]:
    start = x.flatten().numpy()
    return np.clip(start - threat.eps, 0, 1), np.clip(start + threat.eps, 0, 1)


def _minus(row: dict[int, float]) -> dict[int, float]:
    return {column: -value for column, value in row.items()}
