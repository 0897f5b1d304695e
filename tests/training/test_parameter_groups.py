"""Learning rates and weight decay of each parameter, by the first step of SGD in closed form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robusttrain.errors import InputError
from robusttrain.noise.pni import PNIWeights
from robusttrain.optim.averaging import EMA
from robusttrain.optim.optimizers import SGD, Adam, AdamW, Optimizer
from robusttrain.optim.schedules import Constant, OneCycle
from robusttrain.training.engine import Batch
from robusttrain.training.parameter_groups import parameter_groups
from robusttrain.training.settings import Training
from robusttrain.training.trainable import partly_frozen
from toys.defenses import batch
from toys.training import trainer

CLASSES = 3


def deep() -> nn.Module:
    """Three blocks and a head in float64, the second with a scale of several axes."""
    torch.manual_seed(0)
    layers = [
        nn.Flatten(1), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5),
        nn.Unflatten(1, (1, 5)), nn.LayerNorm([1, 5]), nn.Flatten(1),
        nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES),
    ]  # fmt: skip
    return nn.Sequential(*layers).double()


# Blocks between the layer and the end of the network.
DEPTH = {"1": 3, "3": 2, "5": 2, "7": 1, "9": 0}


def first_step(optimizer: Optimizer, **keys: Any) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """The model before and after a step, and the gradient there."""
    model, before = deep(), deep()
    x, y = batch()
    made = trainer(model=model, optimizer=optimizer, epochs=10, **keys)
    made.engine.train_batch(made.defense, Batch(x, y % CLASSES), made.history)
    loss = nn.functional.cross_entropy(before(x), y % CLASSES)
    return before, model, list(torch.autograd.grad(loss, list(before.parameters())))


def test_the_rate_of_a_block_decays_with_each_block_behind_it() -> None:
    before, after, gradients = first_step(SGD(0.2, 0.0, 0.0, layer_decay=0.5))
    changed = dict(after.named_parameters())
    for (name, start), slope in zip(before.named_parameters(), gradients, strict=True):
        rate = 0.2 * 0.5 ** DEPTH[name.partition(".")[0]]
        torch.testing.assert_close(changed[name], start - rate * slope, rtol=1e-10, atol=1e-12)


def test_all_settings_of_a_step_work_together() -> None:
    """Warm-up, layer decay, weight decay without norms and biases, clipping, and averaging."""
    optimizer = SGD(0.2, 0.0, 0.1, layer_decay=0.5, decay_norms_and_biases=False)
    settings = Training(trainable=["head", "[37].*", "5.*"], clip_gradient=0.01)
    model, before = deep(), deep()
    x, y = batch()
    with partly_frozen(model, settings, CLASSES):
        made = trainer(
            model=model, optimizer=optimizer, schedule=Constant(warmup=0.5), averaging=EMA(0.3),
            clip_gradient=settings.clip_gradient, epochs=10,
        )  # fmt: skip
        warm = made.engine.total // 2
        weights, mean = {n: p.detach().clone() for n, p in before.named_parameters()}, {}
        for step in range(3):
            before.load_state_dict(weights)
            made.engine.train_batch(made.defense, Batch(x, y % CLASSES), made.history)
            loss = nn.functional.cross_entropy(before(x), y % CLASSES)
            trained = {n: p for n, p in before.named_parameters() if not n.startswith("1.")}
            slopes = torch.autograd.grad(loss, list(trained.values()))
            norm = torch.stack([slope.square().sum() for slope in slopes]).sum().sqrt()
            for (name, start), slope in zip(trained.items(), slopes, strict=True):
                layer = name.partition(".")[0]
                decay = 0.1 if name.endswith("weight") and layer != "5" else 0.0
                rate = step / warm * 0.2 * 0.5 ** DEPTH[layer]
                gradient = slope * min(1.0, 0.01 / norm) + decay * start
                weights[name] = (start - rate * gradient).detach()
            share = max(0.7, 1 - (1 + step) / (10 + step))
            mean = {
                name: value if step == 0 else (1 - share) * mean[name] + share * value
                for name, value in weights.items()
            }
    for expected, context in ((weights, None), (mean, made.averaged())):
        if context is not None:
            context.__enter__()
        for name, value in model.named_parameters():
            torch.testing.assert_close(value.detach(), expected[name], rtol=1e-6, atol=1e-9)


def test_a_schedule_scales_all_rates_and_the_rate_that_is_shown_is_that_of_the_head() -> None:
    made = trainer(
        model=deep(), optimizer=AdamW(0.2, layer_decay=0.5), schedule=OneCycle(0.5), epochs=2
    )
    groups = made.engine.optimizer.param_groups
    for _ in range(3):
        made.engine.optimizer.step()
        made.engine.scheduler.step()
        rates = [group["lr"] for group in groups]
        assert made.engine.lr == rates[0] == max(rates)
        assert rates == pytest.approx([rates[0] * 0.5**depth for depth in range(4)])


def test_noise_has_the_peak_rate_and_no_weight_decay() -> None:
    model = nn.Sequential(nn.Flatten(1), nn.Linear(6, 4), nn.Linear(4, CLASSES))
    PNIWeights().install(model, 0)
    *others, noise = parameter_groups(model, SGD(0.2, layer_decay=0.5), CLASSES)
    assert len(noise["params"]) == 2
    assert {key: value for key, value in noise.items() if key != "params"} == {"weight_decay": 0.0}
    assert [group.get("lr") for group in others] == [None, 0.1]


def test_by_default_all_weights_are_one_group() -> None:
    model = deep()
    (group,) = parameter_groups(model, Adam(), CLASSES)
    assert list(group) == ["params"]
    assert all(p is q for p, q in zip(group["params"], model.parameters(), strict=True))


@pytest.mark.parametrize("make", [SGD, Adam, AdamW])
@pytest.mark.parametrize("value", [0, -0.5, 1.5, float("nan")])
def test_layer_decay_is_a_share(make: Callable[..., Optimizer], value: float) -> None:
    with pytest.raises(InputError, match="above 0 and up to 1"):
        make(layer_decay=value)
