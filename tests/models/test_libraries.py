"""Networks of timm and torchvision: trained, attacked, saved, loaded and evaluated."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.pgd import PGD, Start
from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.data import Split
from robusttrain.data.synthetic import Synthetic
from robusttrain.defenses import Defense
from robusttrain.defenses.mart import MART
from robusttrain.defenses.trades import TRADES
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.evaluation import Evaluation
from robusttrain.evaluation.attack_suite import evaluate
from robusttrain.models import build_model
from robusttrain.optim.optimizers import SGD
from robusttrain.runs.saved_model import load_model
from robusttrain.threat import Norm, Threat
from toys.libraries import ARCHITECTURES
from toys.training import state_of, trainer

CLASSES, SHAPE, EPS = 4, (3, 32, 32), 8 / 255
DATA = Synthetic([*SHAPE], CLASSES, train_size=8, test_size=4, validation=0)


every_architecture = pytest.mark.parametrize("kind", ARCHITECTURES)


def defenses() -> list[Defense]:
    near = PGD(eps=EPS, steps=1, start=Start.gaussian)
    attack = PGD(eps=EPS, steps=1)
    return [WorstCase(attack), TRADES(near), MART(attack)]


def images(count: int = 2, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


def saved(kind: str, model: nn.Module, path: Path) -> Path:
    architecture = ARCHITECTURES[kind]
    target = f"{type(architecture).__module__}.{type(architecture).__qualname__}"
    config = {
        "model": {"_target_": target, **dataclasses.asdict(architecture)},  # type: ignore[call-overload]
        "noise": {"_target_": "robusttrain.noise.none.NoNoise"},
        "norm": "linf", "eps": EPS, "seed": 0, "data_dir": "data",
    }  # fmt: skip
    Checkpoint(model.state_dict(), CLASSES, [*SHAPE], config, {}, 0, {}).save(path)
    return path


@every_architecture
def test_a_network_is_trained_attacked_saved_loaded_and_evaluated(
    kind: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build_model(ARCHITECTURES[kind], CLASSES, SHAPE)
    for defense in defenses():
        before = state_of(model)
        # One batch of two, after which no epoch has ended.
        started = trainer(
            defense, model=model, data=DATA, eps=EPS, epochs=1, batch_size=4, optimizer=SGD(0.001)
        )
        next(started.batches())
        assert not torch.equal(before, state_of(model))
        assert state_of(model).isfinite().all()

    x, y = images(), torch.tensor([0, 3])
    before, model = state_of(model), model.eval()
    x_adv = PGD(eps=EPS, steps=2)(model, x, y, generator=torch.Generator().manual_seed(0))
    assert 0 < (x_adv - x).abs().max() <= EPS + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert torch.equal(before, state_of(model))
    assert all(parameter.requires_grad for parameter in model.parameters())

    loaded = load_model(saved(kind, model, tmp_path / "best.pt"))
    assert torch.equal(state_of(loaded), state_of(model))
    # Training has changed the layout in memory, and with it the rounding.
    assert torch.allclose(loaded(x_adv), model(x_adv), atol=1e-4, rtol=1e-4)

    settings = Evaluation({"near": FGSM(eps=EPS)}, samples=None)
    ledger = evaluate(loaded, Split(x, y), settings, threat=Threat(Norm.linf, EPS), seed=0)
    assert ledger.misclassified.tolist() == (loaded(x).argmax(1) != y).tolist()
    assert (ledger.worst_case(Threat(Norm.linf, EPS)) >= ledger.misclassified).all()
