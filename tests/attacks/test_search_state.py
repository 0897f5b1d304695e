"""What searches keep for each image, and the Jacobian that some of them ask for."""

import pytest
import torch
from torch import Tensor

from robusttrain.attacks.attack_loss import AttackLoss, cross_entropy
from robusttrain.attacks.model_view import QueryCounter
from robusttrain.attacks.search_state import WeightSearch
from toys.attacks import everywhere, tanh_network


def test_a_weight_search_closes_in_on_each_image_s_threshold() -> None:
    thresholds = torch.tensor([3e-5, 0.2, 1.0, 40.0, 7e3], dtype=torch.float64)
    search = WeightSearch(torch.ones(5, dtype=torch.float64))
    tried = []
    for _ in range(30):
        tried.append(search.weight)
        search.go_on(above=search.weight > thresholds)
    # Tenfold steps until both sides are known, geometric means from then on.
    assert tried[1].tolist() == [0.1, 0.1, 10.0, 10.0, 10.0]
    assert tried[2][2] == pytest.approx(10**0.5)
    assert torch.allclose(search.weight, thresholds, rtol=1e-6)


def test_a_weight_of_0_stays() -> None:
    search = WeightSearch(torch.zeros(2))
    for _ in range(3):
        search.go_on(above=torch.tensor([True, False]))
        assert search.weight.tolist() == [0, 0]


@pytest.mark.parametrize("size", [2, 100])
def test_the_jacobian_is_that_of_autograd_in_batches_that_fit(size: int) -> None:
    network, x, y = tanh_network(12, 4), everywhere(5, 1, 3, 4), torch.tensor([0, 1, 2, 3, 0])
    graphs: list[int] = []

    def products(logits: Tensor, part: slice) -> Tensor:
        graphs.append(len(logits))
        return logits[:, :3] * (1 + y[part, None])

    model = QueryCounter(network, size)
    values, slopes = AttackLoss(model, y, cross_entropy, targeted=False).jacobian(x, products)
    assert graphs == ([2, 2, 1] if size == 2 else [5])
    assert (model.forward_passes, model.backward_passes) == (5, 15)

    def whole(images: Tensor) -> Tensor:
        outputs: Tensor = network(images)[:, :3] * (1 + y[:, None])
        return outputs

    assert torch.allclose(values, whole(x))
    # An image's outputs hang on no other image.
    full = torch.autograd.functional.jacobian(whole, x)
    expected = torch.stack([full[i, :, i] for i in range(5)])
    assert torch.allclose(slopes, expected, rtol=1e-9)
