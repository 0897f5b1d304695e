"""Kills at chosen moments: code that is run at the start of a process, which ends itself."""

import random
import signal
from collections.abc import Callable, Iterator

from toys.command_line import Running

# SIGKILL before a file that was written gets its name, or right after that.
_KILL = """
import os, signal
from pathlib import Path
replace, written = Path.replace, []
def replacing(self, target):
    written.append(target)
    if (len(written), "before") == {moment}:
        os.kill(os.getpid(), signal.SIGKILL)
    replaced = replace(self, target)
    if (len(written), "after") == {moment}:
        os.kill(os.getpid(), signal.SIGKILL)
    return replaced
Path.replace = replacing
"""

# A training whose second epoch is rolled back twice: for non-finite losses and for overfitting.
# What brings both about depends on the state of the training alone, so that it does not matter when
# it was killed.
ROLLING_BACK = ["training.on_nonfinite=rollback", "training.on_overfit=rollback"]
TROUBLE = """
import math
from robusttrain.training.engine import Engine
from robusttrain.training.overfitting import TrainingHistory
train, end = Engine.train_batch_within_memory, TrainingHistory.end_epoch
def training(self, defense, batch, history):
    if history.lr_factor == 1 and batch.epoch == 2 and batch.y[0] == 3:
        batch = batch._replace(x=batch.x * math.nan)
    return train(self, defense, batch, history)
def ending(self, pgd, *others):
    return end(self, -1.0 if self.lr_factor == 0.5 else pgd, *others)
Engine.train_batch_within_memory, TrainingHistory.end_epoch = training, ending
"""


def kills(least: int = 5) -> Iterator[str]:
    """Code for one process after the other, which kills it after `least` files or some more."""
    draw = random.Random(0)
    # After fewer files it may have written only what it was resumed from.
    while True:
        yield _KILL.format(
            moment=(draw.randint(least, 3 * least), draw.choice(["before", "after"]))
        )


def until_done(start: Callable[[str], Running], least: int = 5) -> list[str]:
    """What processes said that were killed one after the other, until one ended.

    `start` gets the code that kills its process.
    """
    said = []
    for code in kills(least):
        answer = start(code).end()
        said.append(answer.said)
        if answer.code != -signal.SIGKILL:
            break
    assert answer.code == 0, answer.said
    return said
