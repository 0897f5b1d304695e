"""Several threat models in a program."""

from typing import Any

import pytest
import torch

import robusttrain as rt
from robusttrain.api.threats import own_threat
from robusttrain.errors import InputError
from robusttrain.threat import Norm, Threat

RADII = {"linf": 0.1, "l2": 1.0}


@pytest.mark.parametrize(
    ("eps", "norm", "threats", "found"),
    [
        (0.3, "l2", None, Threat(Norm.l2, 0.3)),
        (None, "linf", RADII, Threat(Norm.linf, 0.1)),
        (None, "l2", RADII, Threat(Norm.l2, 1.0)),
        # The default of the function is no choice.
        (None, "linf", {"l1": 2.0, "l2": 1.0}, Threat(Norm.l1, 2.0)),
    ],
)
def test_one_threat_model_is_that_of_the_run(
    eps: float | None, norm: str, threats: dict[str, float] | None, found: Threat
) -> None:
    assert own_threat(eps, norm, threats, "a radius") == found


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({}, "eps=None"),
        ({"threats": {}}, "eps=None"),
        ({"threats": RADII, "eps": 0.1}, "eps=0.1"),
        ({"threats": {"l0": 3.0}}, "threats.l0=3.0"),
        ({"threats": {"linf": 3.0}}, "threats.linf=3.0"),
    ],
)
def test_what_is_no_threat_model_is_refused_in_one_message(
    keys: dict[str, Any], named: str
) -> None:
    model, x = torch.nn.Flatten(), torch.rand(4, 1, 1, 3)
    with pytest.raises(InputError, match=named):
        rt.evaluate(model, x, torch.arange(4) % 3, progress=False, **keys)


def test_an_evaluation_has_a_worst_case_for_each_threat_model() -> None:
    model, x = torch.nn.Flatten(), torch.rand(12, 1, 1, 3)
    words = ["evaluation.audit=false"]
    table = rt.evaluate(
        model, x, x.flatten(1).argmax(1), threats=RADII, evaluation="quick", overrides=words,
        progress=False,
    ).table  # fmt: skip
    worst = table[table["attack"] == "worst_case"]
    assert dict(zip(worst["norm"], worst["eps"], strict=True)) == RADII
    assert table["attack"].iloc[-1] == "union"
