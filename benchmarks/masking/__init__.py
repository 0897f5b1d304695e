"""Planted and honest models, and the attacks that find the truth about them; see maskings.py."""
