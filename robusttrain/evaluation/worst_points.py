"""The worst point that searches have found for each image."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robusttrain.evaluation.session import EvaluationSession, Predictions


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
