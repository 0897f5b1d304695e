"""What is no point of the threat model is no success, is counted, and fails the audit."""

import io
import math
from collections.abc import Callable
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

import robusttrain
from robusttrain.attacks import Attack, frugal, states_threat, under
from robusttrain.attacks.pgd import PGD
from robusttrain.config import build as configs
from robusttrain.config import schema
from robusttrain.config.folders import CONF
from robusttrain.data import Split, image_index
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation, cache, evaluate
from robusttrain.evaluation.attack_suite import attack_all, open_session
from robusttrain.evaluation.audit import audit
from robusttrain.evaluation.curves import Probe
from robusttrain.evaluation.findings import NO_AUDIT, Check
from robusttrain.evaluation.pipeline import EvaluationResult
from robusttrain.evaluation.validity import BOX_TOLERANCE, checked, invalid_images
from robusttrain.report.ledger import Ledger
from robusttrain.report.terminal import Terminal
from robusttrain.runs.results import result_of
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import TOLERANCE
from toys.attacks import EXTERNAL, is_missing, seeded

# No pixel of the toy gets exactly to the threshold, where the first class would win.
EPS = 0.105
THREAT = Threat(Norm.linf, EPS)
INVALID = "invalid adversarial images"
every_norm = pytest.mark.parametrize("norm", list(Norm))
radii = st.floats(math.log(1e-4), math.log(100)).map(math.exp)


def grey(count: int = 1) -> Tensor:
    return torch.full((count, 1, 2, 2), 0.5)


def invalid(returned: object, x: Tensor, threat: Threat = THREAT) -> list[bool]:
    return invalid_images(returned, x, threat, 2).tolist()


# --- the check itself ---------------------------------------------------------------------------


@every_norm
@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    eps=radii,
    parts=st.lists(st.floats(-3e-5, 3e-5), min_size=1, max_size=5),
)
def test_the_ball_ends_a_part_in_100_000_behind_its_radius(
    norm: Norm, seed: int, eps: float, parts: list[float]
) -> None:
    """In float64, and image by image; the oracle is NumPy's norm."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.rand(len(parts), 1, 3, 4, generator=draws)
    delta = torch.randn(x.shape, generator=draws, dtype=torch.float64).numpy()
    order = {Norm.linf: np.inf, Norm.l2: 2, Norm.l1: 1}[norm]
    sizes = np.linalg.norm(delta.reshape(len(x), -1), order, axis=1)
    wanted = eps * (1 + np.array(parts)) / sizes
    z = (x.double() + torch.from_numpy(delta * wanted.reshape(-1, 1, 1, 1))).float()
    moved = (z.double() - x.double()).flatten(1).numpy()
    outside = np.linalg.norm(moved, order, axis=1) > eps * (1 + TOLERANCE)
    box = torch.maximum(-z, z - 1).flatten(1).amax(1).double().numpy()
    outside |= box > min(BOX_TOLERANCE, eps * TOLERANCE)
    assert invalid(z, x, Threat(norm, eps)) == outside.tolist()


@pytest.mark.parametrize(
    ("pixel", "eps", "expected"),
    [
        (1.0, 0.5, False),
        (1 + 2**-23, 0.5, False),
        (1 + 2**-22, 0.5, True),
        # In a small ball that is more than a part in 100,000 of the radius.
        (1 + 2**-23, 1e-3, True),
        (0.0, 0.5, False),
        (-(2.0**-24), 0.5, False),
        (-1e-6, 0.5, True),
    ],
)
def test_the_box_ends_where_float32_rounds(pixel: float, eps: float, expected: bool) -> None:
    z = grey()
    z[0, 0, 1, 1] = pixel
    x = z.clamp(0, 1)
    assert invalid(z, x, Threat(Norm.linf, eps)) == [expected]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every_norm
def test_one_pixel_that_is_not_finite_is_enough(norm: Norm, value: float) -> None:
    z = grey(5)
    z[3, 0, 0, 1] = value
    assert invalid(z, grey(5), Threat(norm, 100.0)) == [False, False, False, True, False]


OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda x: None,
    "an array": lambda x: x.numpy(),
    "a list": lambda x: list(x),
    "fewer images": lambda x: x[1:],
    "more images": lambda x: torch.cat([x, x]),
    "flat images": lambda x: x.flatten(1),
    "one image for all": lambda x: x[:1],
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "bytes": lambda x: (255 * x).byte(),
    "another device": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_of_another_type_or_shape_all_images_are_invalid(make: Callable[[Tensor], Any]) -> None:
    x = grey(5)
    assert invalid(make(x), x) == [True] * 5
    assert torch.equal(checked(make(x), x, THREAT, 2).x_adv, x)


def test_valid_images_stay_as_they_are_beside_invalid_ones() -> None:
    x = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    z = (x + EPS).clamp(0, 1)
    z[1] += 7
    z[2, 0, 0, 0] = math.nan
    found = checked(z.requires_grad_(), x, THREAT, 3)
    assert found.invalid == 2
    assert not found.x_adv.requires_grad
    assert torch.equal(found.x_adv, torch.stack([z[0], x[1], x[2], z[3]]))


# --- evaluations --------------------------------------------------------------------------------


class Threshold(nn.Module):
    """Class 1 where the one pixel is above 1/2; what is not finite is of no class."""

    def forward(self, x: Tensor) -> Tensor:
        score = 8 * (x.flatten(1) - 0.5)
        return torch.cat([-score, score], 1)


def data() -> Split:
    pixels = torch.arange(0, 256, 3)
    return Split(pixels.to(torch.uint8).view(-1, 1, 1, 1), (pixels > 127).long())


COUNT = 86
DISTANCES = np.abs(np.arange(0, 256, 3) / 255 - 0.5)
NEAR = int((DISTANCES < EPS).sum())


class Own:
    """An attack of a user's own that says nothing of itself, in a line."""

    def __init__(self, line: Callable[[Tensor], Any]) -> None:
        self.line = line

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Any:
        return self.line(x)


def of_nan(x: Tensor) -> Tensor:
    return torch.full_like(x, math.nan)


def in_place(x: Tensor) -> Tensor:
    """Changes the image that it was given, so that nothing seems to have moved."""
    return x.copy_((x + 0.5) % 1)


BROKEN: dict[str, Callable[[Tensor], Any]] = {
    **OTHERS,
    "NaN": of_nan,
    "infinite": lambda x: x / 0,
    "x + 7": lambda x: x + 7,
    "another image": lambda x: (x + 0.5) % 1,
    "a little too far": lambda x: x + (EPS + 1e-5) * (0.5 - x).sign(),
    "in place": in_place,
}  # fmt: skip
del BROKEN["one image for all"]


def evaluated(attacks: dict[str, Attack]) -> Ledger:
    """An evaluation after which the images are what they were."""
    index, subject = open_session(Threshold().eval(), data(), Evaluation(batch_size=20), 0)
    before = subject.x.clone()
    ledger = attack_all(subject, index, attacks, False, threat=THREAT)
    assert torch.equal(subject.x, before)
    return ledger


def found_by_the_audit(attacks: dict[str, Attack], probe: PGD) -> Check:
    """Its check, on a few images."""
    few = Split(data().images[::9], data().labels[::9])
    index, subject = open_session(Threshold().eval(), few, Evaluation(batch_size=20), 0)
    ledger = attack_all(subject, index, attacks, False, threat=THREAT)
    checks = audit(Probe(subject, probe), attacks, ledger).checks
    return next(check for check in checks if check.check == INVALID)


@pytest.mark.parametrize("name", BROKEN)
def test_invalid_images_break_nothing_and_are_counted(name: str) -> None:
    ledger = evaluated({"own": Own(BROKEN[name]), "pgd": PGD(eps=EPS, steps=4)})
    own = ledger.outcomes["own"]
    assert not own.broken.any()
    assert not own.size.any()
    assert np.array_equal(own.margin, ledger.margin)
    assert ledger.adversarial is not None
    assert all(np.isfinite(images).all() for images in ledger.adversarial.values())
    report = ledger.report(THREAT).set_index("attack")
    assert report["invalid"].to_dict() == {"clean": 0, "own": COUNT, "pgd": 0, "worst_case": COUNT}
    assert report["accuracy"]["own"] == 1
    assert report["accuracy"]["worst_case"] == report["accuracy"]["pgd"] == 1 - NEAR / COUNT


def test_what_is_valid_of_an_attack_counts() -> None:
    """Every second image of it is NaN, and the others are on the other side of the threshold."""

    def half(x: Tensor) -> Tensor:
        z = (x + EPS * (0.5 - x).sign()).clamp(0, 1)
        z[::2] = math.nan
        return z

    # In batches of 20 the images at even places are those at even places of a batch.
    ledger = evaluated({"own": Own(half)})
    expected = (DISTANCES < EPS) & (np.arange(COUNT) % 2 == 1)
    assert np.array_equal(ledger.outcomes["own"].broken, expected)
    assert ledger.outcomes["own"].invalid == COUNT / 2


def test_images_with_a_graph_and_views_of_the_image_are_as_good_as_others() -> None:
    def with_graph(x: Tensor) -> Tensor:
        return x.clone().requires_grad_() + 0

    attacks: dict[str, Attack] = {"graph": Own(with_graph), "view": Own(lambda x: x.view_as(x))}
    assert evaluated(attacks).report(THREAT)["invalid"].tolist() == [0, 0, 0, 0]


def test_an_image_that_the_attack_overwrites_is_none_that_the_next_attack_sees() -> None:
    """It gets a copy: the figures of other attacks are those without it."""

    def whitened(x: Tensor) -> Tensor:
        x.fill_(1)
        return x

    others: dict[str, Attack] = {"pgd": PGD(eps=EPS, steps=4)}
    alone, ledger = evaluated(others), evaluated({"own": Own(whitened), **others})
    assert np.array_equal(ledger.outcomes["pgd"].broken, alone.outcomes["pgd"].broken)
    assert np.array_equal(ledger.outcomes["pgd"].margin, alone.outcomes["pgd"].margin)


class Probing(PGD):
    """A probe, half of whose images are beyond its radius."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
        x_adv = super().__call__(model, x, y, **keys)
        x_adv[::2] = 2
        return x_adv


def test_an_invalid_image_fails_the_audit_whoever_returned_it() -> None:
    """Each of 10 images in the suite, and every second one in all curves, controls and restarts."""
    honest = PGD(eps=EPS, steps=4)
    check = found_by_the_audit({"pgd": honest}, honest)
    assert (check.figure, check.verdict.value) == (0, "pass")
    check = found_by_the_audit({"own": Own(of_nan)}, honest)
    assert (check.figure, check.verdict.value) == (10, "fail")
    check = found_by_the_audit({}, Probing(eps=EPS, steps=4))
    assert check.figure > 10 * 10 / 2
    assert check.verdict.value == "fail"


@every_norm
def test_the_threat_that_an_attack_states_is_what_it_is_held_against(norm: Norm) -> None:
    """Of one pixel all norms are the same."""
    far = PGD(norm=norm, eps=0.3, steps=4)
    ledger = evaluated({"far": far, "silent": Own(lambda x: x + 0.3 * (0.5 - x).sign())})
    assert ledger.outcomes["far"].invalid == 0
    assert ledger.outcomes["far"].broken.sum() > NEAR
    assert ledger.outcomes["silent"].invalid == COUNT


def test_a_run_without_an_audit_warns() -> None:
    names = {"dataset": "toy", "model": "toy", "defense": "toy", "noise": "none"}
    said = io.StringIO()
    ledger = evaluated({"own": Own(lambda x: x + 7), "pgd": PGD(eps=EPS, steps=2)})
    found = EvaluationResult(ledger, NO_AUDIT, None, [])
    terminal = Terminal(Console(file=said, soft_wrap=True))
    images = image_index(None, len(found.ledger.index))
    result_of(found, names, THREAT, 0, images).show(terminal)
    (warning,) = [line for line in said.getvalue().splitlines() if "warning" in line]
    assert warning.startswith("warning: own returned 86 invalid images")
    assert "linf, eps 0.105" in warning


def test_pieces_that_were_never_checked_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an evaluation that an earlier version has begun."""
    x = grey()
    now = cache.description(Threshold(), x, x, "work")
    monkeypatch.setattr(cache, "FORMAT", 1)
    assert cache.description(Threshold(), x, x, "work") != now


# --- our own attacks ----------------------------------------------------------------------------

SHAPE, CLASSES = (1, 6, 6), 4
OF_SEVERAL = ("max", "msd")
OPTIONS = sorted(
    file.stem
    for file in (CONF / "attack").glob("*.yaml")
    if file.stem not in OF_SEVERAL and not is_missing(file.stem)
)
ONE_NORM = ("carlini_wagner", "ddn", "foolbox", "torchattacks")


def network(seed: int = 0) -> nn.Module:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(1), nn.Linear(64, CLASSES)
        )  # fmt: skip

    made: nn.Module = seeded(build, seed)
    return made.eval()


@pytest.fixture(scope="module")
def attacks() -> dict[str, Attack]:
    """Every option of `attack=`, as the configuration has it."""
    schema.register()
    words = [f"+attack@evaluation.attacks.own_{option}={option}" for option in OPTIONS]
    names = [
        f"evaluation.attacks.own_{option}.name={EXTERNAL[option][1]}"
        for option in OPTIONS
        if option in EXTERNAL
    ]
    run = "evaluation.attacks.own_transfer.source.run=/nowhere"
    with (
        hydra.initialize_config_dir(str(CONF), version_base="1.3"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(robusttrain, "load_model", lambda run, trust: network(1))
        # The one norm that all of them know.
        config = hydra.compose("config", [*words, *names, run, "norm=l2", "evaluation=quick"])
        built = configs.build(configs.with_numbers(config))
    return {option: built.evaluation.attacks[f"own_{option}"] for option in OPTIONS}


@pytest.mark.parametrize("option", OPTIONS)
@every_norm
def test_every_attack_of_ours_is_valid_at_every_radius(
    option: str, norm: Norm, attacks: dict[str, Attack]
) -> None:
    attack = attacks[option]
    assert states_threat(attack)
    if option in ONE_NORM and norm is not Norm.l2:
        with pytest.raises(InputError, match="l2"):
            under(attack, Threat(norm, EPS))
        return
    model = network()

    @settings(max_examples=8)
    @given(eps=st.one_of(st.sampled_from([0.0, 1e-4, 1e-3]), radii), seed=st.integers(0, 1000))
    def holds(eps: float, seed: int) -> None:
        draws = torch.Generator().manual_seed(seed)
        # A third of the pixels are black or white.
        pixels = torch.rand(6, *SHAPE, generator=draws) * 1.5 - 0.25
        images = (255 * pixels.clamp(0, 1)).byte()
        labels = model(images / 255).argmax(1)
        threat = Threat(norm, eps)
        suite: dict[str, Attack] = {"own": frugal(under(attack, threat))}
        ledger = evaluate(model, Split(images, labels), Evaluation(suite), threat=threat, seed=seed)
        assert ledger.outcomes["own"].invalid == 0

    holds()
