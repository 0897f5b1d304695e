"""Lengths and images in other units than pixels in [0, 1] are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.friendly import FriendlyPGD
from robusttrain.attacks.images import images_are_valid
from robusttrain.attacks.mim import MIM
from robusttrain.attacks.none import NoAttack
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.transfer import Transfer
from robusttrain.defenses.free import Free
from robusttrain.defenses.grad_align import GradAlign
from robusttrain.defenses.ibp import IBP
from robusttrain.defenses.lsa import LSA
from robusttrain.defenses.n_fgsm import NFGSM
from robusttrain.defenses.rt import RT
from robusttrain.errors import InputError
from robusttrain.threat import Norm
from toys.attacks import ATTACKS, batchnorm_network, everywhere, generator
from toys.external import prepared

SEARCHES = {k: v for k, v in ATTACKS.items() if k != "carlini_wagner"}
# Attacks that search a ball, and defenses with a radius of their own.
BOUNDED: dict[str, Any] = {
    **SEARCHES, "free": Free, "rt": RT, "n_fgsm": NFGSM, "lsa": LSA, "grad_align": GradAlign,
    "ibp": lambda **keys: IBP(NoAttack(), **keys),
}  # fmt: skip


@pytest.mark.parametrize("make", BOUNDED.values(), ids=BOUNDED.keys())
def test_no_radius_in_linf_is_larger_than_the_box(make: Any) -> None:
    assert make(norm="linf", eps=1.0).threat.eps == 1
    refused = (
        r"^eps=8 is too large for pixels in \[0, 1\], where 8 of 255 levels are 8/255: "
        r"at most 1 in linf$"
    )
    with pytest.raises(InputError, match=refused):
        make(norm="linf", eps=8)


@pytest.mark.parametrize("norm", [Norm.l2, Norm.l1])
def test_in_other_norms_it_may_be(norm: Norm) -> None:
    """The longest perturbation of images of 3 x 32 x 32 pixels is 55 in l2, and 3,072 in l1."""
    assert PGD(norm, 8.0, step_size=2.0).eps == RT(norm, 8.0).eps == 8


def random_start(**keys: Any) -> FGSM:
    return FGSM(random_start=True, **keys)


@pytest.mark.parametrize("make", [PGD, MIM, FriendlyPGD, random_start, Free])
def test_no_step_in_linf_is_longer_than_the_box(make: Any) -> None:
    with pytest.raises(InputError, match=r"^step_size=2 is too large .* 2/255: at most 1 in linf$"):
        make(eps=0.1, step_size=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eps=8", r"^eps=8 is too large .*8/255"),
        ("attack.eps=8", r"^attack\.eps=8"),
        ("attack.step_size=2", r"^attack\.step_size=2"),
        ("defense=standard eps=2", r"^eps=2"),
        ("defense=rt defense.eps=4", r"^defense\.eps=4"),
        ("evaluation=quick evaluation.probe.eps=8", r"^evaluation\.probe\.eps=8"),
    ],
)
def test_the_command_line_names_the_key(words: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepared(*words.split())


def bytes_() -> Tensor:
    return (everywhere(4, 3, 4, 4) * 255).byte()


IMAGES: dict[str, tuple[Tensor, str]] = {
    "bytes": (bytes_(), r"^x has dtype torch\.uint8: .*float32 or float64 in \[0, 1\].*/ 255$"),
    "bytes as floats": (bytes_().float(), r"^x has values from 0 to 255: images must be in \[0, 1"),
    "integers": (bytes_().long(), r"^x has dtype torch\.int64"),
    "half": (everywhere(4, 3, 4, 4).half(), r"^x has dtype torch\.float16"),
    "normalised": (4 * everywhere(4, 3, 4, 4).float() - 2, r"^x has values from -2 to 2: "),
    "one pixel": (torch.zeros(4, 3, 4, 4).index_fill(0, torch.tensor(3), 1.01), r"from 0 to 1\.01"),
    "nan": (torch.full((4, 3, 4, 4), torch.nan), r"^x has values from nan to nan"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_in_other_units_are_refused_with_their_range(name: str) -> None:
    (x, message), network, y = IMAGES[name], batchnorm_network(3), torch.arange(4) % 3
    attacks = [make() for make in SEARCHES.values()]
    for attack in (*attacks, Transfer(network, attacks[0])):
        with pytest.raises(InputError, match=message):
            attack(network, x, y)


def test_rounding_of_a_normalisation_is_allowed() -> None:
    x = everywhere(4, 3, 4, 4, dtype=torch.float32)
    assert (x == 1).any()
    x = ((x - 0.485) / 0.229) * 0.229 + 0.485 + 1e-7
    assert x.max() > 1
    x_adv = PGD(eps=0.1)(batchnorm_network(3), x, torch.arange(4) % 3, generator=generator())
    assert x_adv.max() <= 1


def test_no_images_have_no_range() -> None:
    x = torch.empty(0, 3, 4, 4)
    assert FGSM(eps=0.1)(batchnorm_network(3), x, torch.empty(0).long()).shape == x.shape


def test_training_knows_its_images() -> None:
    """To look at them would make every batch wait for a GPU."""
    x = 4 * everywhere(4, 3, 4, 4, dtype=torch.float32) - 2
    with images_are_valid():
        FGSM(eps=0.1)(batchnorm_network(3), x, torch.arange(4) % 3)
    with pytest.raises(InputError):
        FGSM(eps=0.1)(batchnorm_network(3), x, torch.arange(4) % 3)
