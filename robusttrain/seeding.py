"""Independent random streams, all derived from one seed.

Each consumer of randomness draws from a stream of its own name, so that switching one on or off
(evaluation, augmentation, a progress display) never changes what another one computes.
"""

import hashlib

import torch


def generator_for(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` whose state depends on `seed` and `name` alone."""
    return torch.Generator(device).manual_seed(derived_seed(seed, name))


def derived_seed(seed: int, name: str) -> int:
    """A 63-bit seed for the stream `name`, unrelated to those of other names and seeds."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def fresh(device: torch.device | str) -> torch.Generator:
    """A generator seeded by the operating system, for callers that ask for no reproducibility."""
    generator = torch.Generator(device)
    generator.seed()
    return generator
