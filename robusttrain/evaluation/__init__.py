"""Evaluation: attacks on a trained model, image by image, into a ledger."""

from robusttrain.evaluation.attack_suite import evaluate
from robusttrain.evaluation.settings import Evaluation

__all__ = ["Evaluation", "evaluate"]
