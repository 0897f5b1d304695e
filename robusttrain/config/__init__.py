"""Configuration: schemas from dataclasses, objects from YAML."""
