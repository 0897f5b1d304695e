"""What loggers have kept, read back."""

from pathlib import Path

Scalars = dict[tuple[str, int], float]
"""(name, step) -> value."""


def in_events(run_dir: Path) -> Scalars:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return {
        (name, event.step): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
