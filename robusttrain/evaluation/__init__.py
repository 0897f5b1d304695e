"""Evaluation: attacks on a trained model, image by image, into a ledger."""

from robusttrain.evaluation.attack_suite import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
