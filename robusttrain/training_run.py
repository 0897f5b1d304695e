"""Training and its files: `train.csv`, `best.pt`, and checkpoints that a run goes on from."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from robusttrain import checkpoint as checkpoints
from robusttrain import interruption
from robusttrain.checkpoint import Checkpoint
from robusttrain.errors import InputError
from robusttrain.health import remarks
from robusttrain.interruption import Interrupted
from robusttrain.report.files import write_csv
from robusttrain.report.terminal import Terminal
from robusttrain.tally import Epoch
from robusttrain.training import Trainer

LATEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


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
            If it is of another model.
        """
        saved.load_into(self.trainer.model, self.folder / LATEST)
        self.trainer.restore(saved.training)
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
        best = self.folder / "best.pt"
        with interruption.deferred() as signalled:
            if self.trainer.position.epoch == 1 and self.trainer.position.batch == 0:
                # What another training has left here is not to be gone on with.
                for name in (LATEST, PREVIOUS):
                    (self.folder / name).unlink(missing_ok=True)
                self._checkpoint().save(best)
            for epoch in self.trainer.batches():
                if epoch is not None:
                    self._keep(epoch)
                elif self._due:
                    self._save_if_sound()
                self._leave_if(signalled(), saved=epoch is not None)
            self._leave_if(signalled(), saved=True)
        checkpoints.load(best).load_into(self.trainer.model, best)
        return self.best

    @property
    def best(self) -> Epoch | None:
        """The epoch that `best.pt` is of."""
        # Without a validation split all ranks are equal, and the last epoch is the best one.
        return max(reversed(self.epochs), key=lambda epoch: epoch.rank, default=None)

    @property
    def _due(self) -> bool:
        return time.monotonic() - self._saved >= 60 * self.trainer.settings.checkpoint_minutes

    def _leave_if(self, signum: int | None, *, saved: bool) -> None:
        if signum is None:
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
        for remark in remarks(self.epochs, classes, planned):
            self.terminal.say(remark)
        write_csv(self.folder / "train.csv", [each.row() for each in self.epochs])
        # Before the checkpoint: whoever dies between the two does this epoch again.
        if self.best is epoch:
            self._checkpoint().save(self.folder / "best.pt")
        self._save()
        self.record(epoch)

    def _save_if_sound(self) -> None:
        # Weights that are no numbers are nothing to go on from; training will notice by itself.
        if self.trainer.sound:
            self._save()

    def _save(self) -> None:
        latest = self.folder / LATEST
        if latest.exists():
            latest.replace(self.folder / PREVIOUS)
        self._checkpoint().save(latest)
        self._saved = time.monotonic()

    def _checkpoint(self) -> Checkpoint:
        training = {**self.trainer.state(), "epochs": [epoch.row() for epoch in self.epochs]}
        return Checkpoint(
            model=self.trainer.model.state_dict(),
            epoch=len(self.epochs),
            training=training,
            **self.about,
        )


def newest_checkpoint(folder: Path, terminal: Terminal) -> Checkpoint | None:
    """The newest checkpoint of a run that can be read; damaged ones are told and passed over."""
    for name in (LATEST, PREVIOUS):
        if (folder / name).exists():
            try:
                return checkpoints.load(folder / name)
            except InputError as error:
                terminal.say(f"warning: {error}")
    return None
