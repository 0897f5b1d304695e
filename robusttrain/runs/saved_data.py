"""The test images of a run, from its configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import OmegaConf

from robusttrain.checkpoints.checkpoint import Checkpoint, refuse_incomplete
from robusttrain.config.build import build_component
from robusttrain.data import ImageIndex, Samples, Split, image_index
from robusttrain.errors import InputError
from robusttrain.runs.inputs import loaded
from robusttrain.runs.trust import refuse_untrusted

# The keys of a saved configuration that its data need, and those that their values refer to.
INHERITED_BY_DATA = ("dataset", "seed", "data_dir")


class SavedData(NamedTuple):
    """A test set.

    Parameters
    ----------
    name
        The option of the data set.
    samples
        Its images and labels.
    found
        How the images are found in the data set as published.
    """

    name: str
    samples: Samples
    found: ImageIndex

    def first(self, count: int) -> Split:
        """The first images, at most `count` of them, in memory."""
        return self.samples.take(torch.arange(min(count, self.samples.size))).loaded()


def saved_data(
    saved: Checkpoint, run: Path | str, trust: Sequence[str], data_dir: Path | None
) -> SavedData:
    """The test set of a run.

    Parameters
    ----------
    saved
        The checkpoint of the run `run`.
    trust
        Packages whose classes the configuration of the data may name; see `load_model`.
    data_dir
        Where the files of the data are, if not where the run had them.

    Raises
    ------
    InputError
        If the data set cannot be built from the configuration or read.
    """
    refuse_incomplete(saved, INHERITED_BY_DATA, run, key="run")
    plain = {key: saved.config[key] for key in INHERITED_BY_DATA}
    refuse_untrusted(plain, trust)
    if data_dir is not None:
        plain["data_dir"] = str(data_dir)
    name = saved.names.get("dataset", "dataset")
    dataset = build_component(OmegaConf.create({**plain, "download": False}))["dataset"]
    if list(dataset.info().image_shape) != list(saved.image_shape):
        raise InputError("run", run, problem=f"was trained on other images than {name} has now")
    _, test = loaded(dataset, name)
    return SavedData(name, test, image_index(dataset, test.size))
