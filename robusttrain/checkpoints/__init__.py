"""Checkpoints: our own format, and the models of other tools."""
