"""Settings of every test: examples are drawn anew from a fixed seed and are never timed."""

from hypothesis import settings

# Deadlines measure the load of the machine, and a random failure in CI helps nobody.
settings.register_profile("project", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("project")
