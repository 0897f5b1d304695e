"""Noise on weights reaches every tensor that a model computes with, in any kind of layer."""

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import utils
from torch.nn.utils import parametrizations

from robusttrain.bounds.intervals import Interval
from robusttrain.defenses.standard import Standard
from robusttrain.errors import InputError
from robusttrain.noise import Noise
from robusttrain.noise.bayes import Bayes
from robusttrain.noise.control import drawing_from, noise_held, noise_off
from robusttrain.noise.layer import Progress, noise_layers, penalty
from robusttrain.noise.pni import PNIActivations, PNIWeights
from robusttrain.noise.stack import Stack
from robusttrain.optim.optimizers import SGD
from robusttrain.seeding import derived_seed
from toys.noise import images, layer_of, seeded, trainer, weights_of


class Attention(nn.Module):
    """Self-attention over the columns of (N, 3, 4)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **settings)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return x + mixed


class Across(nn.Module):
    """Attention with keys and values of other sizes, which has three weights instead of one."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.attention(x, x[:, :, :3], x[:, :, :2])[0]
        return mixed


class Positions(nn.Module):
    """Embeddings, and a module's own parameters, in each form that torch has."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4)
        self.own = nn.Parameter(torch.randn(1, 3, 4))
        self.list = nn.ParameterList([torch.randn(4, 4), torch.randn(4)])
        self.dict = nn.ParameterDict({"a": torch.randn(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table(torch.arange(3)) + self.own
        mixed: Tensor = (x @ self.list[0] + self.list[1]) @ self.dict["a"]
        return mixed


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.cell(x[:, 0])
        second: Tensor = self.cell(x[:, 1], first)[0]
        return second


class Twice(nn.Module):
    """One layer that a pass uses twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        twice: Tensor = self.linear(self.linear(x).tanh())
        return twice


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(4, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.bilinear(x, x.tanh())
        return product


def encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(encoder_layer(), 2)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def everywhere(model: nn.Module, normalise: Callable[..., Any], names: Any = "weight") -> None:
    """Normalise the weights of all layers; torch.nn.utils.weight_norm is deprecated and warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for module in list(model.modules()):
            if isinstance(module, nn.Linear | nn.Conv2d):
                normalise(module, name=names)


def normalised(normalise: Callable[..., Any]) -> nn.Module:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(1), nn.Linear(12, 3)
    )
    everywhere(model, normalise)
    return model


def normalised_attention(normalise: Callable[..., Any]) -> nn.Module:
    model = Attention()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        normalise(model.attention, name="in_proj_weight")
    return model


class Kind(NamedTuple):
    """A model of (N, 3, 4), and its weights by the names that it computes with."""

    make: Callable[[], nn.Module]
    weights: list[str]


ENCODER = [
    "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight",
]  # fmt: skip
CONVOLUTIONS = ["1.weight", "4.weight"]
OLD: dict[str, Callable[..., Any]] = {
    "old weight norm": utils.weight_norm,
    "old spectral norm": utils.spectral_norm,
}
NEW: dict[str, Callable[..., Any]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
IN_PROJ, OUT_PROJ = "attention.in_proj_weight", "attention.out_proj.weight"
PLAIN = {
    "linear": Kind(lambda: nn.Linear(4, 2), ["weight"]),
    "convolutions": Kind(
        lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.Tanh(), nn.ConvTranspose1d(4, 2, 2)),
        ["0.weight", "2.weight"],
    ),
    "attention": Kind(Attention, [IN_PROJ, OUT_PROJ]),
    "attention with biases": Kind(
        lambda: Attention(add_bias_kv=True),
        [IN_PROJ, OUT_PROJ, "attention.bias_k", "attention.bias_v"],
    ),
    "attention across": Kind(
        Across, [*(f"attention.{which}_proj_weight" for which in "qkv"), OUT_PROJ]
    ),
    "encoder layer": Kind(encoder_layer, ENCODER),
    "encoder": Kind(encoder, [f"layers.{n}.{name}" for n in (0, 1) for name in ENCODER]),
    "parameters": Kind(Positions, ["own", "table.weight", "list.0", "dict.a"]),
    "cell": Kind(Cell, ["cell.weight_ih", "cell.weight_hh"]),
    "twice": Kind(Twice, ["linear.weight"]),
    "bilinear": Kind(Pair, ["bilinear.weight"]),
    "tied": Kind(tied, ["0.weight", "2.weight"]),
    "layer norm": Kind(lambda: nn.LayerNorm((3, 4)), ["weight", "bias"]),
}
KINDS = PLAIN | {
    name: Kind(lambda way=way: normalised(way), CONVOLUTIONS)  # type: ignore[misc]
    for name, way in (OLD | NEW).items()
} | {
    f"attention with {name}": Kind(
        lambda way=way: normalised_attention(way), [IN_PROJ, OUT_PROJ]  # type: ignore[misc]
    )
    for name, way in (OLD | NEW).items()
}  # fmt: skip

every = pytest.mark.parametrize("kind", list(KINDS))
MECHANISMS: dict[str, Callable[[], Noise]] = {
    "pni_w": lambda: PNIWeights(0.75),
    "bayes": lambda: Bayes(0.3, prior=0.5, kl=1.0),
}
both = pytest.mark.parametrize("mechanism", list(MECHANISMS))


def made(kind: str, seed: int = 0) -> nn.Module:
    """The model of a kind, without noise, in float64; each normalisation has its own size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = KINDS[kind].make().double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + torch.rand_like(parameter)).add_(torch.rand_like(parameter) / 9)
        # The older form updates its weights in the next pass.
        model.eval()(sequences())
    return model


def noisy(kind: str, mechanism: str, seed: int = 0) -> nn.Module:
    model = made(kind, seed)
    MECHANISMS[mechanism]().install(model, 7)
    return model.double()


def sequences() -> Tensor:
    return torch.rand(2, 3, 4, generator=seeded(1)).double()


def effective(model: nn.Module, name: str) -> Tensor:
    """The weights that `model`, without noise, computes with."""
    path, _, attribute = name.rpartition(".")
    value: Tensor = getattr(model.get_submodule(path), attribute)
    return value.detach().clone()


def bare(kind: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """The same function as a model whose parameters are the weights, and these weights."""
    model = made(kind, seed)
    weights = {name: effective(model, name) for name in KINDS[kind].weights}
    if kind in PLAIN:
        return model, weights
    plain = normalised(lambda *a, **k: None) if "attention" not in kind else Attention()
    plain = plain.double()
    others = {name: p for name, p in model.named_parameters() if name in plain.state_dict()}
    plain.load_state_dict(others | weights)
    return plain, weights


def drawn(mechanism: str, weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Weights with the noise of `drawing_from(model, seed)`, by the formulas of the papers."""
    found = {}
    for number, (name, weight) in enumerate(weights.items()):
        stream = seeded(derived_seed(seed, f"layer {number}"))
        size = 0.75 * weight.std() if mechanism == "pni_w" else 0.3
        found[name] = weight + size * torch.empty(weight.shape).double().normal_(generator=stream)
    return found


@every
@both
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("graph", [True, False])
def test_a_pass_computes_with_noise_on_every_weight(
    kind: str, mechanism: str, training: bool, graph: bool
) -> None:
    """By the same function of weights to which the noise was added by hand.

    Attention reads its weights one to five times in a pass, by mode and by whether gradients are
    wanted, and not through the layers that have them.
    """
    model = noisy(kind, mechanism).train(training)
    if "spectral" in kind:
        # A pass in train mode updates its estimate.
        model.eval()
        for layer in noise_layers(model):
            layer.train(training)
    plain, weights = bare(kind)
    layers = noise_layers(model)
    by_place = {layer.place: number for number, layer in enumerate(layers)}
    assert sorted(by_place) == sorted(KINDS[kind].weights)
    ordered = {name: weights[name] for name in by_place}
    with torch.set_grad_enabled(graph):
        for seed in (3, 4):
            with drawing_from(model, seed):
                output = model(sequences())
            weights = drawn(mechanism, ordered, seed)
            expected = torch.func.functional_call(plain, weights, (sequences(),), tie_weights=False)
            torch.testing.assert_close(output, expected)


@every
def test_exactly_the_tensors_of_two_axes_have_noise(kind: str) -> None:
    """The reference are the parameters of the same function without normalisation, not names."""
    plain, _ = bare(kind)
    named = plain.named_parameters(remove_duplicate=False)
    expected = {name for name, parameter in named if parameter.dim() > 1}
    assert {layer.place for layer in noise_layers(noisy(kind, "pni_w"))} == expected


@every
@both
def test_each_weight_alone_changes_outputs(kind: str, mechanism: str) -> None:
    model = noisy(kind, mechanism).eval()
    for layer in noise_layers(model):
        with noise_off(model):
            layer.on_predict = True
            assert not torch.equal(model(sequences()), model(sequences())), layer.place
    with noise_off(model):
        torch.testing.assert_close(model(sequences()), bare(kind)[0](sequences()))


STEP = 1e-5


def slope(model: nn.Module, value: Callable[[], Tensor], direction: dict[str, Tensor]) -> float:
    """The derivative of `value` along a `direction` of parameters, by central differences."""

    def after(step: float) -> float:
        for name, along in direction.items():
            model.get_parameter(name).add_(along, alpha=step)
        return float(value())

    with torch.no_grad():
        ahead, behind = after(STEP), after(-2 * STEP)
        after(STEP)
    return (ahead - behind) / (2 * STEP)


def differentiated(
    model: nn.Module, value: Callable[[], Tensor], direction: dict[str, Tensor]
) -> float:
    """The same derivative, by the gradient."""
    along = [model.get_parameter(name) for name in direction]
    gradients = torch.autograd.grad(value(), along, allow_unused=True, materialize_grads=True)
    pairs = zip(direction.values(), gradients, strict=True)
    return sum(float((part * gradient).sum()) for part, gradient in pairs)


def directions(model: nn.Module, of: Callable[[str], bool]) -> dict[str, Tensor]:
    stream = seeded(2)
    return {
        name: torch.empty_like(p).normal_(generator=stream)
        for name, p in model.named_parameters()
        if of(name)
    }


def is_of_noise(name: str) -> bool:
    return name.endswith(("scale", "log_sigma"))


@every
@both
def test_gradients_reach_the_parameters_of_the_noise(kind: str, mechanism: str) -> None:
    model = noisy(kind, mechanism).eval()

    def value() -> Tensor:
        with drawing_from(model, 3):
            return model(sequences()).square().sum()  # type: ignore[no-any-return]

    learnt = directions(model, is_of_noise)
    assert len(learnt) == len(KINDS[kind].weights)
    for name, direction in learnt.items():
        expected = slope(model, value, {name: direction})
        assert abs(expected) > 1e-6
        assert differentiated(model, value, {name: direction}) == pytest.approx(expected, rel=1e-4)


@every
def test_gradients_reach_the_parameters_of_normalised_weights(kind: str) -> None:
    model = noisy(kind, "bayes").eval()

    def value() -> Tensor:
        with drawing_from(model, 3):
            return model(sequences()).square().sum()  # type: ignore[no-any-return]

    direction = directions(model, lambda name: not is_of_noise(name))
    expected = slope(model, value, direction)
    assert differentiated(model, value, direction) == pytest.approx(expected, rel=1e-4)


@every
@pytest.mark.parametrize("training", [True, False])
def test_the_divergence_is_that_of_the_normalised_weights(kind: str, training: bool) -> None:
    model = noisy(kind, "bayes").train(training)
    before = copy.deepcopy(model.state_dict())
    found = penalty(model, Progress(1, 10))
    assert found is not None
    prior = Normal(torch.tensor(0.0).double(), 0.5)
    expected = sum(
        float(kl_divergence(Normal(weight, 0.3), prior).sum()) for weight in bare(kind)[1].values()
    )
    assert found.item() == pytest.approx(expected / 10)
    # Reading an estimate of spectral norm does not update it.
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@every
def test_the_gradient_of_the_divergence_reaches_all_of_its_parameters(kind: str) -> None:
    model = noisy(kind, "bayes").eval()

    def value() -> Tensor:
        found = penalty(model, Progress(1, 10))
        assert found is not None
        return found

    direction = directions(model, lambda name: True)
    expected = slope(model, value, direction)
    assert differentiated(model, value, direction) == pytest.approx(expected, rel=1e-4)


@every
@both
def test_a_file_brings_back_weights_and_noise(kind: str, mechanism: str) -> None:
    model, again = noisy(kind, mechanism).eval(), noisy(kind, mechanism, seed=1).eval()
    with torch.no_grad():
        for layer in noise_layers(model):
            for parameter in layer.parameters():
                parameter.mul_(1.5)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    outputs = []
    for part in (model, again):
        with drawing_from(part, 5):
            outputs.append(part(sequences()))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(penalty(part, Progress(1, 1)) for part in (model, again)))


@both
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "old" not in kind])
def test_a_copy_has_its_own_draws(kind: str, mechanism: str) -> None:
    """The older form of normalisation keeps results as attributes, which torch cannot copy."""
    model, reference = noisy(kind, mechanism).eval(), noisy(kind, mechanism).eval()
    twin = copy.deepcopy(model)
    for _ in range(2):
        twin(sequences())
    assert torch.equal(model(sequences()), reference(sequences()))
    before = twin(sequences())
    with noise_off(model):
        assert not torch.equal(twin(sequences()), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.isfinite(twin(sequences())).all()
    assert float(weights_of(twin).abs().sum()) > 0


@both
@pytest.mark.parametrize("kind", ["attention", "weight norm", "old weight norm"])
def test_held_noise_is_one_draw(kind: str, mechanism: str) -> None:
    model = noisy(kind, mechanism).eval()
    with noise_held(model, 3):
        one = model(sequences())
        torch.testing.assert_close(one[:1], model(sequences()[:1]))
    with noise_held(model, 4):
        assert not torch.equal(model(sequences()), one)


@both
def test_a_pass_that_fails_does_not_hold_its_draws(mechanism: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    MECHANISMS[mechanism]().install(model, 0)
    hook = model[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(sequences())
    hook.remove()
    first: Any = model[0]
    assert not torch.equal(first.weight, first.weight)
    assert not torch.equal(model(sequences()), model(sequences()))


def test_a_weight_that_is_read_outside_of_a_pass_is_drawn_each_time() -> None:
    model = nn.Linear(4, 4)
    PNIWeights().install(model, 0)
    assert not torch.equal(model.weight, model.weight)


@pytest.mark.parametrize("mechanism", [PNIWeights, PNIActivations])
def test_one_number_has_no_deviation_and_no_noise(mechanism: type[PNIWeights]) -> None:
    """Divided by n - 1 it would be NaN, and so would every prediction."""
    model = nn.Sequential(nn.Linear(1, 1))
    plain = copy.deepcopy(model)
    mechanism().install(model, 0)
    x = torch.rand(5, 1)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("way", list(OLD | NEW))
def test_noise_on_noise_on_normalised_weights(way: str) -> None:
    """Both act, variances add up, and the divergence is that of the weights without noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 30, bias=False))
        everywhere(model, (OLD | NEW)[way])
        plain = copy.deepcopy(model) if way in NEW else model
    identity = torch.eye(30)
    clean = plain.eval()(identity).detach()
    Stack({"a": PNIWeights(1.0), "b": Bayes(0.2, prior=0.5, kl=1.0)}).install(model, 3)
    found = torch.stack([model.eval()(identity).detach() for _ in range(300)])
    expected = (clean.std() ** 2 + 0.2**2).sqrt()
    assert (found - clean).std().item() == pytest.approx(expected.item(), rel=0.02)
    value = penalty(model, Progress(1, 1))
    assert value is not None
    divergence = kl_divergence(Normal(clean, 0.2), Normal(0.0, 0.5)).sum()
    assert value.item() == pytest.approx(divergence.item(), rel=1e-4)


class Classifier(nn.Module):
    """Attention between the rows of an image, with weights that are normalised in both forms."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.first = parametrizations.weight_norm(nn.Linear(36, 8))
        self.last = utils.spectral_norm(nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.first(self.mix(x[:, 0]).flatten(1)).relu())
        return logits


@both
def test_it_trains(mechanism: str) -> None:
    """All parameters change in an epoch, including those of the noise."""
    model = Classifier()
    MECHANISMS[mechanism]().install(model, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    list(trainer(model, Standard(), optimizer=SGD(0.1)).epochs())
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert still == []
    assert not torch.equal(model.eval()(images()), model(images()))


def test_bounds_are_those_of_the_model_in_eval_mode() -> None:
    model = nn.Sequential(nn.Flatten(1), parametrizations.weight_norm(nn.Linear(36, 3))).eval()
    plain = copy.deepcopy(model)
    PNIWeights(predict=False).install(model, 0)
    bounds = [part(Interval.around(images(), 0.1)) for part in (model, plain)]
    assert torch.equal(bounds[0].lower, bounds[1].lower)
    assert torch.equal(bounds[0].upper, bounds[1].upper)


# --- refusals ----------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(x)[0][:, -1])
        return logits


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        script: nn.Module = torch.jit.script(nn.Linear(4, 2))
    return nn.Sequential(nn.Linear(4, 4), script)


UNREACHABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lstm": (lambda: Recurrent(nn.LSTM), r"LSTM \(rnn\)"),
    "gru": (lambda: Recurrent(nn.GRU), r"GRU \(rnn\)"),
    "rnn": (lambda: Recurrent(nn.RNN), r"RNN \(rnn\)"),
    "script": (scripted, r"Linear \(1\)"),
}


@both
@pytest.mark.parametrize("which", list(UNREACHABLE))
def test_weights_that_noise_cannot_reach_are_refused_by_name(mechanism: str, which: str) -> None:
    make, named = UNREACHABLE[which]
    model = make()
    before = list(model.modules())
    with pytest.raises(InputError, match=f"^noise={mechanism} cannot reach the weights of {named}"):
        MECHANISMS[mechanism]().install(model, 0)
    assert list(model.modules()) == before
    assert not noise_layers(model)


def test_a_script_without_weights_is_accepted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(nn.Linear(4, 2), torch.jit.script(nn.ReLU()))
    PNIWeights().install(model, 0)
    assert layer_of(model).place == "0.weight"
