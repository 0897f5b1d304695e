"""Passes through a network are counted, whoever makes them."""

import pytest
import torch
from torch import nn

from robusttrain.models.passes import Passes


@pytest.fixture
def network() -> nn.Module:
    return nn.Linear(2, 3)


def test_each_image_counts_once_in_each_direction(network: nn.Module) -> None:
    passes = Passes()
    with passes.counting(network):
        network(torch.rand(5, 2)).sum().backward()
        with torch.no_grad():
            network(torch.rand(2, 2))
    assert (passes.forward, passes.backward, passes.total) == (7, 5, 12)


def test_only_those_in_the_block_count(network: nn.Module) -> None:
    passes = Passes()
    network(torch.rand(5, 2))
    with passes.counting(network):
        pass
    network(torch.rand(5, 2))
    assert passes.total == 0


def test_a_second_derivative_counts_as_another_pass_back(network: nn.Module) -> None:
    passes, x = Passes(), torch.rand(4, 2, requires_grad=True)
    with passes.counting(network):
        loss = network(x).square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        gradient.square().sum().backward()
    assert (passes.forward, passes.backward) == (4, 8)


def test_the_hook_changes_no_gradient(network: nn.Module) -> None:
    x = torch.rand(5, 2)
    gradients = []
    for counting in (False, True):
        network.zero_grad()
        if counting:
            with Passes().counting(network):
                network(x).square().sum().backward()
        else:
            network(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_compiled_network_is_counted_without_new_compilations(network: nn.Module) -> None:
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        compilations.append(graph)
        return graph

    compiled = torch.compile(network, backend=backend)
    passes = Passes()
    for _ in range(3):
        with passes.counting(compiled):
            compiled(torch.rand(5, 2)).sum().backward()
    assert (passes.forward, passes.backward) == (15, 15)
    assert len(compilations) == 1
