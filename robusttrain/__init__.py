"""robusttrain: train image classifiers against adversarial examples, and measure it honestly."""

__version__ = "0.1.0"
