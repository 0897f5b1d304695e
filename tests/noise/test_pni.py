"""Parametric noise injection against its formula and the gradients of the formula."""

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn

from robusttrain.noise.control import noise_held
from robusttrain.noise.layer import noise_layers
from robusttrain.noise.pni import PNIActivations, PNIWeights
from toys.noise import continued, images, layer_of, network, seeded


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4).double()


def test_weights_are_w_plus_scale_times_n() -> None:
    """He, Rakin and Fan 2019, equations 1 and 2, written out with the deviation of the layer."""
    model, plain = linear(), linear()
    PNIWeights(initial=0.7).install(model, 3)
    stream = continued(layer_of(model))
    w, x = plain.weight.detach(), torch.rand(5, 6, dtype=torch.float64)
    deviation = ((w - w.mean()).square().sum() / (w.numel() - 1)).sqrt()
    for _ in range(2):
        n = deviation * torch.empty_like(w).normal_(generator=stream)
        expected = x @ (w + 0.7 * n).T + plain.bias
        torch.testing.assert_close(model(x), expected)


def test_every_pass_has_a_draw_that_all_of_its_images_share() -> None:
    model = linear()
    PNIWeights().install(model, 3)
    x = torch.rand(1, 6, dtype=torch.float64).expand(3, 6)
    one, other = model(x), model(x)
    torch.testing.assert_close(one, one[:1].expand(3, 4))
    assert (one - other).abs().min() > 0


def test_the_noise_is_normal() -> None:
    model = nn.Linear(300, 300)
    w = model.weight.detach().clone()
    PNIWeights(initial=0.25).install(model, 3)
    noise = (model.weight.detach() - w).flatten().numpy()
    assert kstest(noise, "norm", (0, 0.25 * float(w.std()))).pvalue > 1e-4


def test_noise_and_deviation_are_constants_of_the_gradient() -> None:
    """dL/dw is that of the noisy weights, dL/dscale their sum over deviation times draw."""
    model, plain = linear(), linear()
    PNIWeights(initial=0.7).install(model, 3)
    n = torch.empty(4, 6, dtype=torch.float64).normal_(generator=continued(layer_of(model)))
    x = torch.rand(5, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    with torch.no_grad():
        deviation = plain.weight.std()
        noisy_weights = plain.weight + 0.7 * deviation * n
        slope = 2 * (x @ noisy_weights.T + plain.bias).T @ x
    (scale,) = layer_of(model).parameters()
    torch.testing.assert_close(model.get_parameter("parametrizations.weight.original").grad, slope)
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(float((slope * deviation * n).sum()), rel=1e-6)


@pytest.mark.parametrize("mechanism", [PNIWeights, PNIActivations])
def test_each_layer_with_weights_learns_one_scale_from_a_quarter(
    mechanism: type[PNIWeights] | type[PNIActivations],
) -> None:
    model = network()
    mechanism().install(model, 3)
    scales = [list(layer.parameters()) for layer in noise_layers(model)]
    assert [[p.shape for p in own] for own in scales] == [[()]] * 3
    assert all(p.requires_grad and p.item() == 0.25 for own in scales for p in own)
    assert len(list(model.parameters())) == len(list(network().parameters())) + 3


def test_biases_have_no_noise() -> None:
    model, plain = network(), network()
    PNIWeights().install(model, 3)
    for place in (0, 3, 5):
        assert torch.equal(model[place].bias, plain[place].bias)


def test_activations_are_z_plus_scale_times_n_with_the_deviation_of_each_image() -> None:
    model, plain = linear(), linear()
    noisy = nn.Sequential(model)
    PNIActivations(initial=0.7).install(noisy, 3)
    # The generator starts with the first pass.
    stream = seeded(layer_of(noisy).seed)
    z = torch.rand(5, 6, dtype=torch.float64) * torch.arange(1, 6).double()[:, None]
    deviation = (z - z.mean(1, keepdim=True)).square().sum(1, keepdim=True).div(5).sqrt()
    for _ in range(2):
        n = torch.empty_like(z).normal_(generator=stream)
        torch.testing.assert_close(noisy(z), plain(z + 0.7 * deviation * n))


def test_the_noise_of_activations_is_a_constant_of_the_gradient() -> None:
    model = nn.Sequential(linear())
    PNIActivations(initial=0.7).install(model, 3)
    z = torch.rand(5, 6, dtype=torch.float64).requires_grad_()
    n = torch.empty_like(z).normal_(generator=seeded(layer_of(model).seed))
    model(z).sum().backward()
    slope = linear().weight.detach().sum(0).expand(5, 6)
    torch.testing.assert_close(z.grad, slope)
    (scale,) = layer_of(model).parameters()
    assert scale.grad is not None
    expected = (slope * z.detach().std(1, keepdim=True) * n).sum()
    assert scale.grad.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_prediction_does_not_depend_on_the_other_images() -> None:
    """It would if the deviation were that of the batch."""
    model = network().eval()
    PNIActivations().install(model, 3)
    x = images()
    glaring: Tensor = torch.cat([x[:1], 50 * images(4, seed=2)])
    with noise_held(model, 1):
        torch.testing.assert_close(model(x)[:1], model(glaring)[:1])


@pytest.mark.parametrize("mechanism", [PNIWeights, PNIActivations])
def test_at_scale_0_it_is_the_model_without_noise(
    mechanism: type[PNIWeights] | type[PNIActivations],
) -> None:
    model, plain, x = network().eval(), network().eval(), images()
    mechanism(initial=0.0).install(model, 3)
    assert torch.equal(model(x), plain(x))
