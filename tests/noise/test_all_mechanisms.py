"""Properties of every mechanism: switches, random streams, copies, files, refusals."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.model_view import Mode, frozen
from robusttrain.checkpoints import checkpoint
from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.config.run_config import Config, Stage
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation
from robusttrain.evaluation.voting import MajorityVote, prediction
from robusttrain.loggers.none import NoLogger
from robusttrain.noise import Noise
from robusttrain.noise.bayes import Bayes
from robusttrain.noise.control import drawing_from, noise_held, noise_off, smoothed
from robusttrain.noise.dropout import Dropout
from robusttrain.noise.exponential import Exponential
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.laplace import Laplace
from robusttrain.noise.layer import Progress, noise_layers, penalty, predicts_randomly
from robusttrain.noise.learn2perturb import Learn2Perturb
from robusttrain.noise.none import NoNoise
from robusttrain.noise.pni import PNIActivations, PNIWeights
from robusttrain.noise.rse import RSE
from robusttrain.noise.smoothing import Smoothing
from robusttrain.noise.uniform import UniformNoise
from robusttrain.noise.weibull import Weibull
from robusttrain.optim.averaging import NoAveraging
from robusttrain.optim.optimizers import SGD
from robusttrain.optim.schedules import Constant
from robusttrain.optim.weight_perturbation import NoPerturbation
from robusttrain.runs import experiment
from robusttrain.runs.context import Origin
from robusttrain.training.settings import Training
from toys.noise import (
    CLASSES,
    DATA,
    LEARNT,
    MECHANISMS,
    SHAPE,
    images,
    network,
    noisy,
    quiet,
    ready,
    trainer,
)

every = pytest.mark.parametrize("mechanism", list(MECHANISMS))


def passes(model: nn.Module, x: Tensor, count: int = 2) -> list[Tensor]:
    return [model(x).detach() for _ in range(count)]


# Switches


@every
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("predict", [False, True])
def test_each_phase_has_a_switch(mechanism: str, train: bool, predict: bool) -> None:
    model, plain, x = noisy(mechanism, train=train, predict=predict), network(), images()
    # Eval mode first, since noisy passes in train mode change the statistics of BatchNorm.
    for mode, on in ((False, predict), (True, train)):
        one, other = passes(model.train(mode), x)
        assert torch.equal(one, other) is not on
        expected, _ = passes(plain.train(mode), x)
        assert torch.equal(one, expected) is not on
    assert predicts_randomly(model) is predict


@every
def test_installed_on_a_model_in_eval_mode_it_is_noise_of_prediction(mechanism: str) -> None:
    for on in (True, False):
        model, x = network().eval(), images()
        MECHANISMS[mechanism](train=not on, predict=on).install(model, 0)
        assert torch.equal(*passes(model, x)) is not on


@every
def test_switched_off_it_is_the_model_without_noise(mechanism: str) -> None:
    model, plain, x = noisy(mechanism).eval(), network().eval(), images()
    with noise_off(model):
        assert not predicts_randomly(model)
        for output in passes(model, x):
            assert torch.equal(output, plain(x))
    assert not torch.equal(*passes(model, x))


@every
def test_smoothed_it_predicts_by_the_majority_for_any_settings(mechanism: str) -> None:
    model, x = noisy(mechanism, predict=False).eval(), images()
    rules = [layer.vote for layer in noise_layers(model)]
    with smoothed(model):
        assert predicts_randomly(model)
        assert isinstance(prediction(model, 3), MajorityVote)
        assert not torch.equal(*passes(model, x))
    assert torch.equal(*passes(model, x))
    assert [layer.vote for layer in noise_layers(model)] == rules


@every
@pytest.mark.parametrize("mode", list(Mode))
def test_crafting_faces_the_noise_of_its_phase(mechanism: str, mode: Mode) -> None:
    x = images()
    for training in (True, False):
        for on in (True, False):
            switches = {"train": on, "predict": not on} if training else {"predict": on}
            model = noisy(mechanism, **switches).train(training)
            with frozen(model, mode):
                assert model.get_submodule("1").training is (mode is Mode.train)
                assert torch.equal(*passes(model, x)) is not on
            assert all(module.training is training for module in model.modules())


@every
def test_a_model_that_calls_all_its_children_is_noisy_once(mechanism: str) -> None:
    """An attached layer is the identity, wherever the model may call it."""

    class Explicit(nn.Module):
        """Calls its layers by name, while a container calls all of its children."""

        def __init__(self) -> None:
            super().__init__()
            for name, layer in network().named_children():
                self.add_module(name, layer)

        def forward(self, x: Tensor) -> Tensor:
            for name in "012345":
                x = self.get_submodule(name)(x)
            return x

    models = [ready(make(), MECHANISMS[mechanism]()) for make in (network, Explicit)]
    outputs = [model.train()(images()) for model in models]
    assert torch.equal(*outputs)


# Held draws


@every
def test_held_it_is_one_draw_for_all_images_and_passes(mechanism: str) -> None:
    model, x = noisy(mechanism).eval(), images(1).expand(5, *SHAPE)
    with noise_held(model, 3):
        assert not predicts_randomly(model)
        one, other = passes(model, x)
    assert torch.equal(one, other)
    torch.testing.assert_close(one, one[:1].expand(5, -1))
    with noise_held(model, 4):
        assert not torch.equal(model(x), one)
    with noise_off(model):
        assert not torch.equal(model(x), one)


@every
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_held_an_output_does_not_depend_on_the_batch(
    mechanism: str, memory_format: torch.memory_format
) -> None:
    model = noisy(mechanism).eval().to(memory_format=memory_format)
    x = images(8).to(memory_format=memory_format)
    with noise_held(model, 3), torch.no_grad():
        whole = model(x)
        parts = torch.cat([model(part) for part in x.split([1, 2, 5])])
        turned = model(x.flip(0)).flip(0)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned, whole, rtol=1e-4, atol=1e-5)


@every
def test_held_draws_do_not_depend_on_earlier_draws(mechanism: str) -> None:
    x = images()
    one, other = noisy(mechanism, seed=7).eval(), noisy(mechanism, seed=8).eval()
    passes(other, x, 3)
    outputs = []
    for model in (one, other):
        with noise_held(model, 5):
            outputs.append(model(x))
    assert torch.equal(*outputs)


@every
def test_an_evaluation_does_not_change_the_draws_of_training(mechanism: str) -> None:
    model, reference, x = noisy(mechanism).eval(), noisy(mechanism).eval(), images()
    for looking in (noise_held(model, 1), noise_off(model), drawing_from(model, 1)):
        with looking:
            passes(model, x)
        assert torch.equal(model(x), reference(x))


# Random streams


@every
def test_the_global_random_stream_is_not_touched(mechanism: str) -> None:
    model, x = network(), images()
    before = torch.get_rng_state()
    MECHANISMS[mechanism](predict=True).install(model, 0)
    for mode in (True, False):
        passes(model.train(mode), x)
    with drawing_from(model, 1), noise_held(model, 2):
        model(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    moved = noisy(mechanism)
    assert torch.equal(moved(x), noisy(mechanism)(x))


@every
def test_the_seed_decides_the_draws(mechanism: str) -> None:
    x = images()
    first, again, other = (noisy(mechanism, seed) for seed in (3, 3, 4))
    for _ in range(3):
        drawn = first(x)
        assert torch.equal(drawn, again(x))
        assert not torch.equal(drawn, other(x))


@every
def test_draws_from_another_stream_repeat(mechanism: str) -> None:
    model, x = noisy(mechanism).eval(), images()
    outputs = []
    for seed in (1, 1, 2):
        with drawing_from(model, seed):
            outputs.append(passes(model, x))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert not torch.equal(outputs[0][0], outputs[0][1])
    assert not torch.equal(outputs[0][0], outputs[2][0])


# Copies and other forms of the same model


@every
def test_a_copy_has_its_own_noise_in_the_same_state(mechanism: str) -> None:
    model, reference, x = noisy(mechanism), noisy(mechanism), images()
    for part in (model, reference):
        part(x)
    twin = copy.deepcopy(model)
    assert len(noise_layers(twin)) == len(noise_layers(model))
    assert not set(noise_layers(twin)) & set(noise_layers(model))
    # Draws of the copy do not change the state of the original, and vice versa.
    expected = passes(reference, x)
    for part in (twin, model):
        for output, reference_output in zip(passes(part, x), expected, strict=True):
            assert torch.equal(output, reference_output)
    # Switching off one must not switch off the other: the hooks of the copy belong to the copy.
    for layer in noise_layers(twin):
        layer.on_train = False
    assert torch.equal(*passes(twin, x))
    assert not torch.equal(*passes(model, x))


@pytest.mark.parametrize("mechanism", LEARNT)
def test_a_copy_learns_independently(mechanism: str) -> None:
    model = noisy(mechanism)
    twin = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    list(trainer(twin, Standard()).epochs())
    assert all(map(torch.equal, model.parameters(), before))
    assert not any(map(torch.equal, twin.parameters(), before))


@every
def test_draws_do_not_depend_on_the_memory_format(mechanism: str) -> None:
    """Trained in one format and loaded in another, a model predicts the same."""
    model, plain, x = noisy(mechanism).eval(), noisy(mechanism).eval(), images()
    model.to(memory_format=torch.channels_last)
    turned = x.to(memory_format=torch.channels_last)
    for output, expected in zip(passes(model, turned), passes(plain, x), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    with noise_held(model, 3), noise_held(plain, 3):
        torch.testing.assert_close(model(turned), plain(x), rtol=1e-4, atol=1e-5)


@every
def test_it_survives_a_change_of_precision(mechanism: str) -> None:
    model, plain, x = noisy(mechanism).eval().double(), network().eval().double(), images().double()
    outputs = passes(model, x)
    assert all(output.dtype == torch.float64 and output.isfinite().all() for output in outputs)
    assert not torch.equal(*outputs)
    with noise_off(model):
        assert torch.equal(model(x), plain(x))


@every
def test_it_works_in_bf16(mechanism: str) -> None:
    model, x = noisy(mechanism).eval(), images().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [model(x) for _ in range(2)]
    assert not torch.equal(*outputs)
    (gradient,) = torch.autograd.grad(outputs[0].float().sum(), x)
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()
    with noise_off(model), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), network().eval()(x))


def test_layers_of_the_model_keep_their_names() -> None:
    """A layer whose name looks like noise is not noise, and is not replaced."""
    model = nn.Sequential()
    model.add_module("noise_1", nn.Linear(4, 3))
    own = model.noise_1
    Gaussian(0.1).install(model, 0)
    Gaussian(0.1).install(model, 1)
    assert model.noise_1 is own
    assert len(noise_layers(model)) == 2


# Files


def checkpoint_of(model: nn.Module) -> Checkpoint:
    return Checkpoint(model.state_dict(), CLASSES, list(SHAPE), {}, {}, 0, {})


@every
def test_a_trained_model_comes_back_from_a_file(mechanism: str, tmp_path: Path) -> None:
    model = noisy(mechanism)
    list(trainer(model, WorstCase(FGSM(eps=0.1))).epochs())
    checkpoint_of(model).save(tmp_path / "model.pt")
    # Another seed, since draws are not part of the weights.
    again, x = noisy(mechanism, seed=8), images()
    checkpoint.load(tmp_path / "model.pt").load_into(again, tmp_path)
    for looking in (noise_off, lambda model: noise_held(model, 3)):
        outputs = []
        for part in (model.eval(), again.eval()):
            with looking(part):
                outputs.append(part(x))
        # Training was in channels_last, which rounds differently.
        torch.testing.assert_close(*outputs)
    penalties = [penalty(part, Progress(1, 10)) for part in (model, again)]
    torch.testing.assert_close(*penalties)


@pytest.mark.parametrize("mechanism", sorted(set(MECHANISMS) - set(LEARNT)))
def test_noise_that_learns_nothing_leaves_the_state_dict_alone(mechanism: str) -> None:
    """Any model can then be loaded with or without it."""
    assert list(noisy(mechanism).state_dict()) == list(network().state_dict())


def run(folder: Path, mechanism: str, given: Path | None = None, lr: float = 0.1) -> Checkpoint:
    """One epoch of training, starting from `given` if there is one."""
    folder.mkdir()
    config = Config(
        dataset=DATA, model=network(), noise=MECHANISMS[mechanism](),  # type: ignore[arg-type]
        attack=FGSM(eps=0.1), defense=WorstCase(FGSM(eps=0.1)), optimizer=SGD(lr, 0.0, 0.0),
        schedule=Constant(), training=Training(epochs=1, batch_size=32), evaluation=Evaluation(),
        weight_perturbation=NoPerturbation(), averaging=NoAveraging(),
        logger=NoLogger(), device="cpu", stages=[Stage.train],
        checkpoint=None if given is None else str(given),
    )  # fmt: skip
    names = dict.fromkeys(("dataset", "model", "defense", "noise"), "x")
    experiment.run(config, Origin({}, names), folder, quiet())
    return checkpoint.load(folder)


@every
def test_a_run_is_resumed_from_a_checkpoint(mechanism: str, tmp_path: Path) -> None:
    first = run(tmp_path / "first", mechanism)
    learnt = [key for key, _ in noisy(mechanism).named_parameters()]
    assert learnt
    # A rate so small that float32 weights do not change.
    onward = run(tmp_path / "onward", mechanism, tmp_path / "first", lr=1e-20)
    untrained = dict(noisy(mechanism).named_parameters())
    assert all(torch.equal(onward.model[key], first.model[key]) for key in untrained)
    # Not each of them, since later layers may be dead for all images in such a short training.
    assert not all(torch.equal(first.model[key], value) for key, value in untrained.items())


# Refusals

REFUSED: list[tuple[Callable[[], Noise], str]] = [
    *(
        (lambda noise=noise, sigma=sigma: noise(sigma), "sigma")  # type: ignore[misc]
        for noise in (Gaussian, Laplace, UniformNoise, Exponential, Weibull, Smoothing)
        for sigma in (-0.1, float("nan"), float("inf"))
    ),
    (lambda: Gaussian(draws=0), "draws"),
    (lambda: Weibull(shape=0), "shape"),
    (lambda: RSE(initial=-0.1), "initial"),
    (lambda: RSE(inner=-0.1), "inner"),
    (lambda: PNIWeights(initial=-0.1), "initial"),
    (lambda: PNIActivations(initial=float("nan")), "initial"),
    (lambda: Learn2Perturb(initial=0), "initial"),
    (lambda: Learn2Perturb(gamma=-1), "gamma"),
    (lambda: Dropout(1), "p"),
    (lambda: Dropout(-0.1), "p"),
    (lambda: Dropout(float("nan")), "p"),
    (lambda: Bayes(initial=0), "initial"),
    (lambda: Bayes(prior=0), "prior"),
    (lambda: Bayes(kl=-1), "kl"),
    (lambda: Smoothing(alpha=0), "alpha"),
    (lambda: Smoothing(alpha=1), "alpha"),
    (lambda: Smoothing(at="first"), "at"),
    (lambda: Smoothing(distribution="weibull"), "distribution"),  # type: ignore[arg-type]
    (lambda: RSE(vote="best"), "vote"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "key"), REFUSED)
def test_settings_out_of_range_are_refused(make: Callable[[], Noise], key: str) -> None:
    with pytest.raises(InputError, match=rf"^{key}=.* is not allowed: it must be "):
        make()


@pytest.mark.parametrize("mechanism", ["rse", "learn2perturb"])
def test_noise_around_convolutions_needs_one(mechanism: str) -> None:
    model = nn.Sequential(nn.Flatten(1), nn.Linear(36, 3))
    before = list(model.modules())
    with pytest.raises(InputError, match=f"^noise={mechanism} needs a convolution"):
        MECHANISMS[mechanism]().install(model, 0)
    assert list(model.modules()) == before


@pytest.mark.parametrize(
    ("mechanism", "model"),
    [
        ("pni_w", nn.Sequential(nn.Flatten(1))),
        ("pni_a", nn.Sequential(nn.Flatten(1))),
        ("bayes", nn.Sequential(nn.Flatten(1))),
        ("dropout", nn.Sequential(nn.Flatten(1), nn.Linear(36, 3))),
    ],
)
def test_noise_without_a_place_is_refused(mechanism: str, model: nn.Module) -> None:
    """A program has no visible layers, and model=linear has only a first one."""
    with pytest.raises(InputError, match=f"^noise={mechanism} needs"):
        MECHANISMS[mechanism]().install(model, 0)


def test_no_noise_installs_nothing() -> None:
    model = network()
    NoNoise().install(model, 0)
    assert noise_layers(model) == []
    assert not predicts_randomly(model)
    assert penalty(model, Progress(1, 10)) is None
