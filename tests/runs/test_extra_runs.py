"""Runs with extra images: the manifest has their digest, and their cost counts them."""

import hashlib
import json
from pathlib import Path

import numpy as np

from toys.command_line import CommandLine
from toys.runs import finished

RUN = [
    "dataset=synthetic", "dataset.train_size=100", "dataset.validation=10", "model=linear",
    "epochs=1", "batch_size=20", "stages=[train]", "device=cpu", "dataset.extra=extra.npz",
    "dataset.extra_share=0.25", "hydra.run.dir=run",
]  # fmt: skip


def test_the_manifest_has_the_digest_and_the_images(
    command_line: CommandLine, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    labels = np.arange(12) % 10
    np.savez(tmp_path / "extra.npz", x=pixels, y=labels)
    finished(command_line.start(*RUN, cwd=tmp_path))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    content = pixels.tobytes() + labels.astype(np.int64).tobytes()
    assert manifest["data"]["extra"] == hashlib.sha256(content).hexdigest()
    assert set(manifest["data"]) == {"train", "test", "extra"}
    # 90 training images in six batches of 15, with 5 extra ones each.
    cost = manifest["cost"]["training"]
    assert round(cost["images_per_second"] * cost["seconds"]) == 90 + 6 * 5
