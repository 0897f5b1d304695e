"""The worst point, and the nearest one, that searches have found for each image."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robusttrain.evaluation.session import EvaluationSession, Predictions
from robusttrain.report.ledger import CLEAN
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball


@dataclass
class WorstPoints:
    """For each image the first point that broke it, or else the one of smallest margin.

    Parameters
    ----------
    label
        The classes of the images, (N,).
    x_adv, margin, broken, prediction
        The points (N, C, H, W), by how much the true class leads there, whether it does not, and
        which class the model predicts.
    """

    label: NDArray[np.int64]
    x_adv: Tensor
    margin: NDArray[np.float32]
    broken: NDArray[np.bool_]
    prediction: NDArray[np.int64]

    @classmethod
    def of(cls, subject: EvaluationSession, clean: Predictions) -> Self:
        """The images of `subject` themselves, of which the model says `clean`."""
        label = subject.y.cpu().numpy()
        wrong = np.not_equal(clean.prediction, label)
        return cls(
            label,
            subject.x.clone(),
            clean.margin.copy(),
            np.asarray(wrong),
            clean.prediction.copy(),
        )

    def offer(self, x_adv: Tensor, seen: Predictions) -> None:
        """Take the points of one more search where they are worse; `seen` is the model there."""
        broken = np.not_equal(seen.prediction, self.label)
        worse = ~self.broken & (broken | (seen.margin < self.margin))
        self.x_adv[worse] = x_adv[worse]
        self.margin[worse] = seen.margin[worse]
        self.prediction[worse] = seen.prediction[worse]
        self.broken |= broken


@dataclass
class NearestPoints:
    """For each image the point nearest to it, in a norm, that broke it; else the image itself.

    Parameters
    ----------
    norm
        The norm.
    x, label
        The images (N, C, H, W), and their classes (N,).
    size
        The distances of the points in pixel units, (N,), and inf where nothing broke the image.
    x_adv, margin, prediction
        The points, by how much the true class leads there, and which class the model predicts.
    by
        The names of the searches that found them, (N,); empty where none did.
    """

    norm: Norm
    x: Tensor
    label: NDArray[np.int64]
    size: NDArray[np.float64]
    x_adv: Tensor
    margin: NDArray[np.float32]
    prediction: NDArray[np.int64]
    by: NDArray[Any]

    @classmethod
    def of(cls, subject: EvaluationSession, norm: Norm, clean: Predictions) -> Self:
        """The images of `subject` themselves, of which the model says `clean`."""
        label = subject.y.cpu().numpy()
        wrong = np.not_equal(clean.prediction, label)
        return cls(
            norm, subject.x, label, np.where(wrong, 0.0, np.inf), subject.x.clone(),
            clean.margin.copy(), clean.prediction.copy(),
            np.where(wrong, CLEAN, "").astype(object),
        )  # fmt: skip

    def offer(self, x_adv: Tensor, seen: Predictions, eps: float, by: str) -> None:
        """Take the points of one more search within `eps` where they break images and are nearer.

        By rounding a point may lie a little outside of its ball; it counts as one on the surface.
        """
        measured = ball(Threat(self.norm, 0)).norm((x_adv - self.x).double())
        size = np.minimum(measured.cpu().numpy(), eps)
        nearer = np.not_equal(seen.prediction, self.label) & (size < self.size)
        self.size[nearer], self.x_adv[nearer] = size[nearer], x_adv[nearer]
        self.margin[nearer], self.prediction[nearer] = seen.margin[nearer], seen.prediction[nearer]
        self.by[nearer] = by

    def merge(self, other: "NearestPoints", rows: NDArray[np.int64]) -> None:
        """Take the points of `other`, whose images stand at `rows` of these, where nearer."""
        nearer = other.size < self.size[rows]
        chosen = rows[nearer]
        self.size[chosen], self.x_adv[chosen] = other.size[nearer], other.x_adv[nearer]
        self.margin[chosen], self.prediction[chosen] = (
            other.margin[nearer],
            other.prediction[nearer],
        )
        self.by[chosen] = other.by[nearer]
