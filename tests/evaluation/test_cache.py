"""An evaluation that is killed goes on where it was, and comes to the same ledger bit for bit."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks import Attack
from robusttrain.attacks.attack_loss import AttackLoss
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.square import Square
from robusttrain.data import Split
from robusttrain.evaluation import Evaluation
from robusttrain.evaluation.attack_suite import attack_all, open_session
from robusttrain.evaluation.cache import NO_CACHE, Cache, FolderCache, description
from robusttrain.evaluation.session import BATCHES_IN_A_POOL
from robusttrain.noise.gaussian import Gaussian
from robusttrain.report.ledger import Ledger
from robusttrain.threat import Norm, Threat

EPS, BATCH = 0.2, 2
IMAGES = 5 * BATCHES_IN_A_POOL * BATCH - 10


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(1), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).eval()


def noisy_network() -> nn.Module:
    model = network()
    Gaussian(0.1, predict=True).install(model, 5)
    return model.eval()


class Undeclared(nn.Module):
    """Noise that torch's global stream is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x + 0.1 * torch.randn_like(x))
        return logits


def data() -> Split:
    """All of them classified correctly but for near ties under noise."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (IMAGES, 1, 2, 2), generator=draw).to(torch.uint8)
    with torch.no_grad():
        return Split(images, network()(images.float() / 255).argmax(1))


class Calls:
    """How often an attack was asked, and at which call the plug is pulled."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.count, self.killed_at = 0, killed_at

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.killed_at:
            raise KeyboardInterrupt


@dataclass
class Pluggable(PGD):
    """PGD that can be interrupted in the middle of a search."""

    def watched(self, calls: Calls) -> "Pluggable":
        self.calls = calls
        return self

    def search(self, surrogate: AttackLoss, x: Tensor, generator: torch.Generator) -> Tensor:
        x_adv = super().search(surrogate, x, generator)
        self.calls()
        return x_adv


class BatchByBatch:
    """An attack of a user's own, which gets a batch at a time."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
        self.calls()
        return PGD(eps=EPS, steps=3)(model, x, y, **keys)


def ours(calls: Calls) -> Attack:
    return Pluggable(eps=EPS, steps=3, restarts=2).watched(calls)


def evaluated(
    model: nn.Module, make: Callable[[Calls], Attack], calls: Calls, saved: Cache
) -> Ledger:
    """An evaluation with an attack before and one after that which is watched."""
    attacks = {
        "before": PGD(eps=0.05, steps=2),
        "watched": make(calls),
        "after": Square(eps=EPS, queries=5),
    }
    settings = Evaluation(attacks, batch_size=BATCH, eot=2, votes=3)
    index, subject = open_session(model, data(), settings, 0)
    subject.saved = saved
    return attack_all(subject, index, attacks, True, threat=Threat(Norm.linf, EPS))


def assert_same(first: Ledger, second: Ledger) -> None:
    pd.testing.assert_frame_equal(first.samples(), second.samples(), check_exact=True)
    assert first.adversarial is not None
    assert second.adversarial is not None
    assert first.adversarial.keys() == second.adversarial.keys()
    for threat, images in first.adversarial.items():
        np.testing.assert_array_equal(images, second.adversarial[threat])
    report, other = (
        ledger.report(Threat(Norm.linf, 0)).drop(columns="seconds") for ledger in (first, second)
    )
    pd.testing.assert_frame_equal(report, other, check_exact=True)


@pytest.mark.parametrize("make", [ours, BatchByBatch])
@pytest.mark.parametrize("build", [network, noisy_network, lambda: Undeclared().eval()])
def test_a_killed_evaluation_goes_on(
    build: Callable[[], nn.Module], make: Callable[[Calls], Attack], tmp_path: Path
) -> None:
    whole = Calls()
    reference = evaluated(build(), make, whole, NO_CACHE)
    assert whole.count >= 3
    killed, folder = Calls(killed_at=2), tmp_path / "pieces"
    with pytest.raises(KeyboardInterrupt):
        evaluated(build(), make, killed, FolderCache(folder, "work"))
    again = Calls()
    # What was drawn elsewhere in the meantime does not matter.
    torch.manual_seed(99)
    continued = evaluated(build(), make, again, FolderCache(folder, "work"))
    assert again.count == whole.count - 1
    assert_same(continued, reference)
    assert 0 < reference.union.sum() < IMAGES


def test_what_is_finished_is_not_computed_again(tmp_path: Path) -> None:
    """Another start costs the passes of the looks alone."""
    passes: list[int] = []
    model = network()
    model.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    reference = evaluated(model, ours, Calls(), FolderCache(tmp_path / "pieces", "work"))
    passes.clear()
    assert_same(
        evaluated(model, ours, Calls(), FolderCache(tmp_path / "pieces", "work")), reference
    )
    # Four to see whether the model is random, one of all images, and one after each attack.
    assert sum(passes) == 4 * BATCH + 4 * IMAGES


def test_a_piece_that_is_cut_short_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "pieces"
    reference = evaluated(network(), ours, Calls(), FolderCache(folder, "work"))
    pieces = sorted(folder.glob("*.pt"))
    assert len(pieces) >= 7
    for piece in pieces[::2]:
        piece.write_bytes(piece.read_bytes()[:100])
    pieces[1].write_bytes(b"")
    assert_same(evaluated(network(), ours, Calls(), FolderCache(folder, "work")), reference)
    calls = Calls()
    evaluated(network(), ours, calls, FolderCache(folder, "work"))
    assert calls.count == 0


def test_pieces_of_other_work_are_not_used(tmp_path: Path) -> None:
    folder = FolderCache(tmp_path / "pieces", "one")
    folder.put("a/0", {"x_adv": torch.ones(2), "forward_passes": 3})
    found = FolderCache(tmp_path / "pieces", "one").get("a/0")
    assert found is not None
    assert torch.equal(found["x_adv"], torch.ones(2))
    assert found["forward_passes"] == 3
    assert folder.get("a/1") is None
    assert FolderCache(tmp_path / "pieces", "other").get("a/0") is None
    assert not (tmp_path / "pieces").exists()


def test_no_folder_is_made_for_nothing_and_none_is_left(tmp_path: Path) -> None:
    folder = FolderCache(tmp_path / "pieces", "one")
    assert folder.get("a/0") is None
    assert not folder.path.exists()
    folder.put("a/0", {})
    folder.remove()
    assert not folder.path.exists()
    folder.remove()


def with_other_weights() -> nn.Module:
    model = network()
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6
    return model


X, Y = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(3)
WORK: dict[str, Any] = {
    "model": network(),
    "x": X,
    "y": Y,
    "settings": (Evaluation({"pgd": PGD(eps=0.1)}), 0.1),
}


@pytest.mark.parametrize(
    "other",
    [
        {"model": with_other_weights()},
        {"x": X + 1e-6},
        {"x": X[:2], "y": Y[:2]},
        {"y": Y.flip(0)},
        {"settings": (Evaluation({"pgd": PGD(eps=0.1, steps=11)}), 0.1)},
        {"settings": (Evaluation({"other": PGD(eps=0.1)}), 0.1)},
        {"settings": (Evaluation({"pgd": PGD(eps=0.1)}, survivors_only=True), 0.1)},
        {"settings": (Evaluation({"pgd": PGD(eps=0.1)}), 0.2)},
    ],
)
def test_work_is_described_by_all_that_it_hangs_on(other: dict[str, Any]) -> None:
    again = {"settings": (Evaluation({"pgd": PGD(eps=0.1)}), 0.1), "model": network()}
    assert description(**(WORK | again)) == description(**WORK)
    assert description(**(WORK | other)) != description(**WORK)


def test_pieces_that_were_exchanged_are_made_again(tmp_path: Path) -> None:
    """Two of one evaluation, and one of another that has the same name."""
    pieces, others = FolderCache(tmp_path / "one", "this"), FolderCache(tmp_path / "other", "that")
    for number, key in enumerate(("first", "second")):
        pieces.put(key, {"value": number})
        others.put(key, {"value": 10 + number})
    first, second = (pieces._file(key) for key in ("first", "second"))
    swapped = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert pieces.get("first") is None
    assert pieces.get("second") == {"value": 1}
    first.write_bytes(others._file("first").read_bytes())
    assert pieces.get("first") is None
    first.write_bytes(swapped)
    assert pieces.get("first") == {"value": 0}


def test_a_run_directory_that_was_removed_does_not_come_back(tmp_path: Path) -> None:
    pieces = FolderCache(tmp_path / "run" / "evaluation.partial", "this")
    with pytest.raises(FileNotFoundError):
        pieces.put("first", {"value": 1})
    assert not (tmp_path / "run").exists()
