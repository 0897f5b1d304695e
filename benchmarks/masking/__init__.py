"""Planted and honest models, and the attack that finds their true robustness; see maskings.py."""
