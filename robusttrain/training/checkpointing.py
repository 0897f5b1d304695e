"""Training and its files: `train.csv`, `best.pt`, and checkpoints that a run resumes from."""

import time
from collections.abc import Callable, Mapping
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
from robusttrain.training.diagnostics import findings_in_last
from robusttrain.training.metrics import Epoch
from robusttrain.training.settings import Keep
from robusttrain.training.trainer import Trainer


class TrainingRun:
    """A trainer, and the run directory that its files go to.

    Parameters
    ----------
    trainer
        A trainer that has not started yet.
    folder
        The run directory.
    metadata
        The fields of a `Checkpoint` that stay the same: num_classes, image_shape, config, names.
    terminal
        Where the figures of each epoch are printed.
    record
        Called with each finished epoch, after its files are written.
    weights
        Where the weights at the start are from, for the manifest. A run that is resumed knows it
        from its checkpoint, and does not need them any more.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        metadata: Mapping[str, Any],
        terminal: Terminal,
        record: Callable[[Epoch], None],
        weights: Mapping[str, str | None] | None = None,
    ) -> None:
        self.trainer, self.folder, self.metadata = trainer, folder, metadata
        self.terminal, self.record, self.weights = terminal, record, weights
        self.epochs: list[Epoch] = []
        self._saved = time.monotonic()

    def restore(self, saved: Checkpoint) -> None:
        """Resume from `saved`, a checkpoint of this run.

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
        # Those of earlier versions do not have it.
        self.weights = saved.training.get("weights")
        self._write_table()

    def finish(self) -> Epoch | None:
        """Train to the end, and load the weights of `best.pt` into the model.

        Returns the epoch that these weights are from, or None if there was no epoch.

        Raises
        ------
        Interrupted
            After the batch during which a signal arrived. A checkpoint is written first.
        NonFiniteLossError
            If training diverges. The files of earlier epochs stay.
        """
        best, agree, due = self.folder / BEST, distributed.DelayedMax(), 0
        with signals.deferred() as signalled:
            if self.trainer.position.epoch == 1 and self.trainer.position.batch == 0:
                self._remove_old_checkpoints()
                self._save_weights(best)
            for epoch in self.trainer.batches():
                if epoch is not None:
                    self._record(epoch)
                elif due:
                    self._save_if_finite()
                signum, due = agree(signalled() or 0, self._is_checkpoint_due)
                self._exit_on(signum, saved=epoch is not None)
            self._exit_on(*agree.last(signalled() or 0), saved=True)
        weights = distributed.broadcast(lambda: checkpoints.load(best))
        self._refuse_other(weights)
        weights.load_into(self.trainer.model, best)
        return self.best

    def _refuse_other(self, weights: Checkpoint) -> None:
        """Refuse a `best.pt` that is not of this training, and was put there since."""
        best = self.best
        epoch = self.epochs.index(best) + 1 if best else 0
        differ = checkpoints.differing(self.metadata["config"], weights.config)
        if differ or weights.epoch != epoch:
            found = f"it is from epoch {weights.epoch}, and this training needs {epoch}"
            allowed = f"{', '.join(differ)} differ" if differ else found
            raise InputError("resume", self.folder / BEST, allowed, "is of another training")

    @property
    def best(self) -> Epoch | None:
        """The epoch whose weights are in `best.pt`."""
        # Without a validation split all ranks are equal, and the last epoch is the best one.
        return max(reversed(self.epochs), key=lambda epoch: epoch.rank, default=None)

    @property
    def _is_checkpoint_due(self) -> bool:
        return time.monotonic() - self._saved >= 60 * self.trainer.settings.checkpoint_minutes

    def _remove_old_checkpoints(self) -> None:
        if distributed.is_main():
            for name in (LATEST, PREVIOUS):
                (self.folder / name).unlink(missing_ok=True)

    def _exit_on(self, signum: int, *, saved: bool) -> None:
        if not signum:
            return
        if not saved:
            self._save_if_finite()
        raise Interrupted(signum)

    def _record(self, epoch: Epoch) -> None:
        self.epochs.append(epoch)
        self.terminal.figures(
            f"epoch {epoch.epoch}/{self.trainer.settings.epochs}",
            loss=epoch.loss,
            clean=epoch.val_clean_accuracy,
            robust=epoch.val_robust_accuracy,
            seconds=epoch.seconds,
        )
        classes, planned = self.metadata["num_classes"], self.trainer.settings.epochs
        for finding in findings_in_last(self.epochs, classes, planned):
            self.terminal.warn(finding.message)
        self._write_table()
        # Before the checkpoint: a run that dies between the two trains this epoch again.
        if self.best is epoch:
            with self.trainer.averaged():
                self._save_weights(self.folder / BEST)
        self._save()
        self.record(epoch)

    def _write_table(self) -> None:
        if distributed.is_main() and self.epochs:
            write_csv(self.folder / TRAIN, [epoch.row() for epoch in self.epochs])

    def _save_if_finite(self) -> None:
        # Never save non-finite weights; training will report them.
        if self.trainer.all_finite:
            self._save()

    def _save(self) -> None:
        latest = self.folder / LATEST
        if distributed.is_main() and latest.exists():
            latest.replace(self.folder / PREVIOUS)
        state = self.trainer.state_dict()
        processes = distributed.gather(self.trainer.per_process_state(state))
        if processes is not None:
            others = {"others": processes[1:]} if len(processes) > 1 else {}
            epochs = [epoch.row() for epoch in self.epochs]
            self._write(latest, {**state, **others, "epochs": epochs, "weights": self.weights})
        self._saved = time.monotonic()

    def _save_weights(self, path: Path) -> None:
        if distributed.is_main():
            self._write(path, {})

    def _write(self, path: Path, training: Mapping[str, Any]) -> None:
        Checkpoint(
            model=self.trainer.model.state_dict(),
            epoch=len(self.epochs),
            training=dict(training),
            **self.metadata,
        ).save(path)


def surplus(keep: Keep) -> tuple[str, ...]:
    """The checkpoints that a run does not need once it has ended."""
    return (PREVIOUS,) if keep is Keep.last else (LATEST, PREVIOUS)


def newest_checkpoint(folder: Path, terminal: Terminal) -> Checkpoint | None:
    """The newest readable checkpoint of a run; prints a warning for each damaged one."""
    for name in (LATEST, PREVIOUS):
        if (folder / name).exists():
            try:
                return checkpoints.load(folder / name)
            except InputError as error:
                terminal.warn(str(error))
    return None
