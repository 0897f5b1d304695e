"""Training and its files: `train.csv`, `best.pt`, and checkpoints that a run goes on from."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.errors import InputError
from robusttrain.report.files import write_csv
from robusttrain.report.terminal import Terminal
from robusttrain.run_directory import BEST, LATEST, PREVIOUS, TRAIN
from robusttrain.runtime import distributed, signals
from robusttrain.runtime.signals import Interrupted
from robusttrain.training.diagnostics import warnings_for
from robusttrain.training.metrics import Epoch
from robusttrain.training.trainer import Trainer


class TrainingRun:
    """A trainer and the run directory that its work is kept in.

    Parameters
    ----------
    trainer
        At its beginning.
    folder
        The run directory.
    about
        The fields of a `Checkpoint` that stay the same: num_classes, image_shape, config, names.
    terminal
        Where epochs are told.
    record
        Called with every epoch that has ended, when its files are written.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        about: Mapping[str, Any],
        terminal: Terminal,
        record: Callable[[Epoch], None],
    ) -> None:
        self.trainer, self.folder, self.about, self.terminal = trainer, folder, about, terminal
        self.record = record
        self.epochs: list[Epoch] = []
        self._saved = time.monotonic()

    def restore(self, saved: Checkpoint) -> None:
        """Go on from `saved`, which this method's run has written.

        Raises
        ------
        InputError
            If it is of another model, or was trained by another number of processes.
        """
        states = [saved.training, *saved.training.get("others", [])]
        if len(states) != distributed.size():
            problem = f"was trained by {len(states)} processes, not by {distributed.size()}"
            allowed = f"give torchrun --nproc_per_node={len(states)}"
            raise InputError("resume", self.folder, allowed, problem)
        saved.load_into(self.trainer.model, self.folder / LATEST)
        own = states[distributed.rank()]
        self.trainer.load_state_dict({**saved.training, **own})
        self.epochs = [Epoch(**row) for row in saved.training["epochs"]]

    def finish(self) -> Epoch | None:
        """Train to the end, and leave the model with the weights of `best.pt`.

        Returns the epoch that they are of; None where there was none.

        Raises
        ------
        Interrupted
            After the batch in which a signal came, and with a checkpoint written.
        NonFiniteLossError
            If training diverges; what earlier epochs left stays.
        """
        best, vote, due = self.folder / BEST, distributed.DelayedMax(), 0
        with signals.deferred() as signalled:
            if self.trainer.position.epoch == 1 and self.trainer.position.batch == 0:
                # Discard the checkpoints of an earlier training.
                self._forget()
                self._save_as(best)
            for epoch in self.trainer.batches():
                if epoch is not None:
                    self._keep(epoch)
                elif due:
                    self._save_if_sound()
                signum, due = vote(signalled() or 0, self._due)
                self._leave_if(signum, saved=epoch is not None)
            self._leave_if(*vote.last(signalled() or 0), saved=True)
        weights = distributed.broadcast(lambda: replace(checkpoints.load(best), training={}))
        weights.load_into(self.trainer.model, best)
        return self.best

    @property
    def best(self) -> Epoch | None:
        """The epoch that `best.pt` is of."""
        # Without a validation split all ranks are equal, and the last epoch is the best one.
        return max(reversed(self.epochs), key=lambda epoch: epoch.rank, default=None)

    @property
    def _due(self) -> bool:
        return time.monotonic() - self._saved >= 60 * self.trainer.settings.checkpoint_minutes

    def _forget(self) -> None:
        if distributed.is_main():
            for name in (LATEST, PREVIOUS):
                (self.folder / name).unlink(missing_ok=True)

    def _leave_if(self, signum: int, *, saved: bool) -> None:
        if not signum:
            return
        if not saved:
            self._save_if_sound()
        raise Interrupted(signum)

    def _keep(self, epoch: Epoch) -> None:
        self.epochs.append(epoch)
        self.terminal.figures(
            f"epoch {epoch.epoch}/{self.trainer.settings.epochs}",
            loss=epoch.loss,
            clean=epoch.val_clean_accuracy,
            robust=epoch.val_robust_accuracy,
            seconds=epoch.seconds,
        )
        classes, planned = self.about["num_classes"], self.trainer.settings.epochs
        for remark in warnings_for(self.epochs, classes, planned):
            self.terminal.say(remark)
        if distributed.is_main():
            write_csv(self.folder / TRAIN, [each.row() for each in self.epochs])
        # Before the checkpoint: whoever dies between the two does this epoch again.
        if self.best is epoch:
            with self.trainer.averaged():
                self._save_as(self.folder / BEST)
        self._save()
        self.record(epoch)

    def _save_if_sound(self) -> None:
        # Never save non-finite weights; training will report them.
        if self.trainer.sound:
            self._save()

    def _save(self) -> None:
        latest = self.folder / LATEST
        if distributed.is_main() and latest.exists():
            latest.replace(self.folder / PREVIOUS)
        self._save_as(latest)
        self._saved = time.monotonic()

    def _save_as(self, path: Path) -> None:
        """Have the first process write a checkpoint, with what the others have of their own."""
        state = self.trainer.state_dict()
        processes = distributed.gather(self.trainer.per_process_state(state))
        if processes is None:
            return
        others = {"others": processes[1:]} if len(processes) > 1 else {}
        Checkpoint(
            model=self.trainer.model.state_dict(),
            epoch=len(self.epochs),
            training={**state, **others, "epochs": [epoch.row() for epoch in self.epochs]},
            **self.about,
        ).save(path)


def newest_checkpoint(folder: Path, terminal: Terminal) -> Checkpoint | None:
    """The newest checkpoint of a run that can be read; damaged ones are told and passed over."""
    for name in (LATEST, PREVIOUS):
        if (folder / name).exists():
            try:
                return checkpoints.load(folder / name)
            except InputError as error:
                terminal.say(f"warning: {error}")
    return None
