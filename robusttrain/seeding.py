"""Independent random streams, all derived from one seed.

Each consumer of randomness draws from a stream of its own, which has a name. Switching a consumer
on or off (evaluation, augmentation, a progress display) then never changes the draws of another.
"""

import hashlib

import torch


def generator_for(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` whose state depends only on `seed` and `name`."""
    return torch.Generator(device).manual_seed(derived_seed(seed, name))


def derived_seed(seed: int, name: str) -> int:
    """A 63-bit seed for the stream `name`, independent of those of other names and seeds."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def fresh(device: torch.device | str) -> torch.Generator:
    """A generator seeded by the operating system, for callers that need no reproducibility."""
    generator = torch.Generator(device)
    generator.seed()
    return generator
