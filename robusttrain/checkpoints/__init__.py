"""Checkpoints of robusttrain, and models of other tools."""
