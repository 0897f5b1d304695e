"""Evaluation on problems whose robust accuracy is known image by image."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks import Attack, ThreatFields
from robusttrain.attacks.apgd import APGD
from robusttrain.attacks.fab import FAB
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.none import NoAttack
from robusttrain.attacks.objectives import AttackObjective
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.square import Square
from robusttrain.attacks.uniform import Uniform
from robusttrain.data import Split, as_input
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation, evaluate
from robusttrain.report.ledger import Ledger
from robusttrain.threat import Norm, Threat

EPS = 0.2


class Threshold(nn.Module):
    """Class 1 where the one pixel is above 1/2: an image is robust iff it is eps away from that."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(8.0))

    def forward(self, x: Tensor) -> Tensor:
        score = self.slope * (x.flatten(1) - 0.5)
        return torch.cat([-score, score], 1)


def split(pixels: list[int], labels: list[int] | None = None) -> Split:
    images = torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 1, 1)
    right = (images.flatten() > 127).long()
    return Split(images, right if labels is None else torch.tensor(labels))


def everywhere(count: int = 103, wrong: int = 5) -> Split:
    """Pixels over the whole range, of which the first `wrong` carry the wrong label."""
    draws = torch.Generator().manual_seed(0)
    made = split(torch.randint(0, 256, (count,), generator=draws).tolist())
    made.labels[:wrong] = 1 - made.labels[:wrong]
    return made


def ledger_of(
    data: Split,
    attacks: dict[str, Attack],
    model: nn.Module | None = None,
    *,
    seed: int = 0,
    eps: float = EPS,
    **settings: Any,
) -> Ledger:
    return evaluate(
        model or Threshold().eval(), data, Evaluation(attacks, **settings),
        threat=Threat(Norm.linf, eps), seed=seed,
    )  # fmt: skip


def accuracies(ledger: Ledger) -> dict[str, float]:
    report = ledger.report(Threat(Norm.linf, 0))
    return dict(zip(report["attack"], report["accuracy"], strict=True))


class Recorded:
    """An attack that keeps what it was given and what it returned."""

    def __init__(self, attack: Attack) -> None:
        self.attack = attack
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
        x_adv = self.attack(model, x, y, **keys)
        self.calls.append((x, y, x_adv))
        return x_adv

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        x, y, x_adv = (torch.cat(parts) for parts in zip(*self.calls, strict=True))
        return x, y, x_adv


@pytest.mark.parametrize("batch_size", [1, 4, 7, 102, 103, 500])
def test_accuracies_count_images_not_batches(batch_size: int) -> None:
    """The last batch is shorter for most of these sizes, and all of it is broken."""
    data = everywhere()
    near = split([128] * 3)
    data = Split(*(torch.cat(parts) for parts in zip(data, near, strict=True)))
    ledger = ledger_of(data, {"fgsm": FGSM(eps=EPS)}, batch_size=batch_size)
    pixel = data.images.flatten().double() / 255
    right = (pixel > 0.5).long() == data.labels
    robust = right & ((pixel - 0.5).abs() > EPS)
    assert accuracies(ledger) == {
        "clean": right.double().mean().item(),
        "fgsm": robust.double().mean().item(),
        "worst_case": robust.double().mean().item(),
    }
    assert np.array_equal(ledger.outcomes["fgsm"].broken, ~robust.numpy())
    assert np.array_equal(ledger.misclassified, ~right.numpy())
    assert np.array_equal(ledger.index, np.arange(106))


def test_margin_and_size_are_those_of_the_attacked_image() -> None:
    data = everywhere()
    outcome = ledger_of(data, {"fgsm": FGSM(eps=EPS)}).outcomes["fgsm"]
    pixel = data.images.flatten().double().numpy() / 255
    sign = 2 * data.labels.numpy() - 1
    moved = (pixel - sign * EPS).clip(0, 1)
    attacked = np.arange(len(pixel)) >= 5
    expected = np.where(attacked, 16 * sign * (moved - 0.5), 16 * sign * (pixel - 0.5))
    np.testing.assert_allclose(outcome.margin, expected, atol=1e-5)
    np.testing.assert_allclose(outcome.size, attacked * np.abs(moved - pixel), atol=1e-6)
    assert np.array_equal(outcome.margin < 0, outcome.broken)


@pytest.mark.parametrize("attack", [FGSM(eps=EPS), PGD(eps=EPS, steps=5), Uniform(eps=EPS)])
def test_the_figures_are_those_of_the_returned_images(attack: Attack) -> None:
    recorded, data = Recorded(attack), everywhere()
    ledger = ledger_of(data, {"attack": recorded}, batch_size=10)
    x, y, x_adv = recorded.joined()
    assert (x_adv - x).abs().max() <= EPS + 1e-6
    with torch.no_grad():
        wrong = Threshold()(x_adv).argmax(1) != y
    attacked = ~ledger.misclassified
    assert np.array_equal(ledger.outcomes["attack"].broken[attacked], wrong.numpy())
    assert ledger.outcomes["attack"].broken[~attacked].all()


def test_misclassified_images_cost_no_attack() -> None:
    recorded, data = Recorded(NoAttack()), everywhere()
    ledger_of(data, {"none": recorded}, batch_size=10)
    x, y, _ = recorded.joined()
    assert torch.equal(x, as_input(data.images[5:]))
    assert torch.equal(y, data.labels[5:])
    # Batches are refilled: none but the last is short.
    assert [len(call[0]) for call in recorded.calls] == [10] * 9 + [8]


def test_a_model_that_is_always_wrong_is_never_attacked() -> None:
    data = everywhere()
    data = Split(data.images, 1 - (data.images.flatten() > 127).long())
    recorded = Recorded(NoAttack())
    assert accuracies(ledger_of(data, {"none": recorded})) == dict.fromkeys(
        ("clean", "none", "worst_case"), 0.0
    )
    assert recorded.calls == []


class Shift:
    """Moves every pixel by a fixed amount."""

    def __init__(self, amount: float) -> None:
        self.amount = amount

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
        return (x + self.amount).clamp(0, 1)


def test_worst_case_means_that_every_attack_failed_on_the_image() -> None:
    # Up breaks the second image, down the third, neither breaks the first and the last.
    data = split([10, 100, 150, 250])
    ledger = ledger_of(data, {"up": Shift(0.2), "down": Shift(-0.2)})
    assert ledger.outcomes["up"].broken.tolist() == [False, True, False, False]
    assert ledger.outcomes["down"].broken.tolist() == [False, False, True, False]
    assert ledger.union.tolist() == [False, True, True, False]
    assert accuracies(ledger) == {"clean": 1, "up": 0.75, "down": 0.75, "worst_case": 0.5}


def test_each_row_states_the_threat_model_of_its_attack() -> None:
    attacks: dict[str, Attack] = {"own": FGSM(Norm.l2, 0.05), "none": NoAttack()}
    report = ledger_of(everywhere(), attacks, eps=0.125).report(Threat(Norm.linf, 0))
    keys = list(report[["attack", "norm", "eps"]].itertuples(index=False, name=None))
    assert keys[:-1] == [
        ("clean", "linf", 0), ("own", "l2", 0.05), ("none", "linf", 0.125),
        ("worst_case", "l2", 0.05), ("worst_case", "linf", 0.125),
    ]  # fmt: skip
    assert keys[-1][:2] == ("union", "")


def test_a_worst_case_has_what_was_found_within_its_threat_model() -> None:
    """A smaller ball and that of a smaller norm lie within; a larger one does not."""
    threats = {
        "small": Threat(Norm.linf, 0.1), "large": Threat(Norm.linf, 0.2), "l2": Threat(Norm.l2, 0.1)
    }  # fmt: skip
    shifts: dict[str, Attack] = {
        "small": Bound(Shift(0.1), threats["small"]), "large": Bound(Shift(0.2), threats["large"]),
        "l2": Bound(Shift(-0.1), threats["l2"]),
    }  # fmt: skip
    # Broken by a shift of 0.1, by one of 0.2 only, by one of -0.1, and by none.
    data = split([120, 90, 150, 20], [0, 0, 1, 0])
    for survivors_only in (False, True):
        ledger = ledger_of(data, shifts, survivors_only=survivors_only, save_adversarial=True)
        assert ledger.worst_case(threats["small"]).tolist() == [True, False, True, False]
        assert ledger.worst_case(threats["large"]).tolist() == [True, True, True, False]
        assert ledger.worst_case(threats["l2"]).tolist() == [False, False, True, False]
        assert ledger.union.tolist() == [True, True, True, False]
        # Only what lies within its own ball is spared to an attack on survivors.
        ran = ledger.outcomes["l2"].attacked
        assert ran is not None
        assert ran.tolist() == [True] * 4
        assert ledger.adversarial is not None
        for threat, images in ledger.adversarial.items():
            moved = np.abs(images.flatten() - data.images.flatten().numpy() / 255)
            assert moved.max() <= threat.eps + 1e-6
            wrong = Threshold()(torch.from_numpy(images)).argmax(1) != data.labels
            assert wrong.tolist() == ledger.worst_case(threat).tolist()


def test_the_choice_of_images_belongs_to_the_data_set() -> None:
    data = everywhere(400)
    chosen = [ledger_of(data, {}, samples=50, seed=seed).index for seed in (0, 1, 2)]
    assert np.array_equal(chosen[0], chosen[1])
    assert np.array_equal(chosen[0], chosen[2])
    assert len(set(chosen[0])) == 50
    assert np.array_equal(chosen[0], np.sort(chosen[0]))
    assert chosen[0].max() > 200
    labels = ledger_of(data, {}, samples=50).label
    assert np.array_equal(labels, data.labels.numpy()[chosen[0]])
    assert np.array_equal(ledger_of(data, {}, samples=401).index, np.arange(400))


def test_the_seed_decides_what_attacks_draw() -> None:
    data = everywhere()
    found = []
    for seed in (0, 0, 1):
        recorded = Recorded(Uniform(eps=EPS))
        ledger_of(data, {"uniform": recorded}, seed=seed)
        found.append(recorded.joined()[2])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_attack_draws_the_same_with_and_without_others() -> None:
    recorded = [Recorded(Uniform(eps=EPS)) for _ in range(2)]
    ledger_of(everywhere(), {"uniform": recorded[0]})
    ledger_of(everywhere(), {"first": Uniform(eps=0.1), "uniform": recorded[1]})
    assert torch.equal(recorded[0].joined()[2], recorded[1].joined()[2])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(1), nn.Linear(1, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(16, 2),
    )  # fmt: skip


ZERO: list[Callable[[], Attack]] = [
    lambda: FGSM(eps=0.0),
    lambda: FGSM(eps=0.0, random_start=True),
    lambda: PGD(eps=0.0, steps=3),
    lambda: PGD(Norm.l2, 0.0, steps=3, restarts=2),
    lambda: PGD(Norm.l1, 0.0, steps=3),
    lambda: Uniform(eps=0.0),
]


@pytest.mark.parametrize("make", ZERO)
def test_at_radius_zero_robust_is_clean(make: Callable[[], Attack]) -> None:
    ledger = ledger_of(everywhere(), {"zero": make()}, network(), eps=0.0)
    assert 0 < ledger.misclassified.sum() < 103
    assert np.array_equal(ledger.outcomes["zero"].broken, ledger.misclassified)
    np.testing.assert_array_equal(ledger.outcomes["zero"].size, 0)


def test_the_model_comes_back_as_it_was_and_nothing_global_moved() -> None:
    model = network().train()
    cast(nn.Module, model[4]).eval()
    cast(nn.Linear, model[1]).weight.requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    ledger_of(everywhere(), {"pgd": PGD(eps=EPS, restarts=2), "uniform": Uniform()}, model)
    assert torch.equal(torch.get_rng_state(), stream)
    assert [module.training for module in model] == [True, True, True, True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * 5]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


class NaNAbove(nn.Module):
    """Right below the limit, not a number above it."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.stack([torch.ones(len(x)), torch.zeros(len(x))], 1)
        return torch.where(x.flatten(1) > self.limit, torch.nan, logits)


def test_logits_that_are_not_numbers_count_as_broken() -> None:
    data = split([0, 100, 240], labels=[0, 0, 0])
    ledger = ledger_of(data, {"up": Shift(0.5)}, NaNAbove(0.8), eps=0.5)
    assert ledger.misclassified.tolist() == [False, False, True]
    assert ledger.outcomes["up"].broken.tolist() == [False, True, True]
    assert accuracies(ledger)["worst_case"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("key", ["samples", "batch_size", "eot", "votes", "probe_samples"])
def test_counts_start_at_one(key: str) -> None:
    with pytest.raises(InputError, match=rf"^{key}=0 is not allowed"):
        Evaluation(**{key: 0})


def test_an_audit_needs_a_probe_and_rows_of_every_report_keep_their_names() -> None:
    with pytest.raises(InputError, match=r"^probe=None is not allowed"):
        Evaluation(audit=True)
    for name in ("clean", "worst_case", "uint8", "control", "noise_off", "eot_5", "probe", "union"):
        with pytest.raises(InputError, match=rf"^attacks={name} is not allowed"):
            Evaluation({name: FGSM()})
    Evaluation({"cleaner": FGSM(), "controlled": FGSM()})


@dataclass
class Bound(ThreatFields):
    """An attack that says what its threat model is."""

    attack: Attack
    own: Threat

    @property
    def threat(self) -> Threat:
        return self.own

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
        return self.attack(model, x, y, **keys)


# --- survivors only -----------------------------------------------------------------------------

# Misclassified, broken by a shift up, by a shift down, by both and by neither.
FATES = ([200, 100, 150, 128, 20], [0, 0, 1, 1, 0])


def fates(**settings: Any) -> tuple[Ledger, dict[str, Recorded]]:
    attacks = {name: Recorded(Shift(by)) for name, by in (("up", 0.2), ("down", -0.2), ("on", 0.1))}
    return ledger_of(split(*FATES), dict(attacks), **settings), attacks


def test_attacks_are_given_only_what_those_before_left_standing() -> None:
    ledger, attacks = fates(survivors_only=True)
    given = {name: attack.joined()[0].flatten() * 255 for name, attack in attacks.items()}
    assert given["up"].round().tolist() == [100, 150, 128, 20]
    assert given["down"].round().tolist() == [150, 128, 20]
    assert given["on"].round().tolist() == [20]
    # A row is what is left after it; otherwise it stands for itself.
    assert list(accuracies(ledger).values()) == [4 / 5, 3 / 5, 1 / 5, 1 / 5, 1 / 5]
    assert list(accuracies(fates()[0]).values()) == [4 / 5, 3 / 5, 2 / 5, 4 / 5, 1 / 5]


def test_an_attack_that_nothing_is_left_for_is_not_asked() -> None:
    attacks = {name: Recorded(Shift(by)) for name, by in (("up", 1.0), ("more", 1.0))}
    ledger = ledger_of(split([10, 20, 30]), dict(attacks), survivors_only=True, eps=1.0)
    assert attacks["more"].calls == []
    assert list(accuracies(ledger).values()) == [1, 0, 0, 0]


def test_samples_name_what_broke_each_first_and_stay_empty_where_nothing_ran() -> None:
    samples = fates(survivors_only=True)[0].samples()
    assert samples["broken_by"].tolist() == ["clean", "up", "down", "down", ""]
    ran = {name: samples[f"{name}_broken"].notna().tolist() for name in ("up", "down", "on")}
    assert ran == {
        "up": [False, True, True, True, True],
        "down": [False, False, True, True, True],
        "on": [False, False, False, False, True],
    }
    for name, rows in ran.items():
        for column in ("margin", "size"):
            assert samples[f"{name}_{column}"].notna().tolist() == rows
    assert samples["up_broken"].dropna().tolist() == [1, 0, 0, 0]
    everyone = fates()[0].samples()
    assert everyone["broken_by"].tolist() == ["clean", "up", "down", "down", ""]
    assert everyone["down_broken"].notna().tolist() == [False, True, True, True, True]


# --- suites -------------------------------------------------------------------------------------


def suite_of(eps: float) -> dict[str, Attack]:
    return {
        "apgd_ce": APGD(eps=eps, steps=10),
        "apgd_t": APGD(eps=eps, steps=10, objective=AttackObjective.dlr, targets=9),
        "fab_t": FAB(eps=eps, steps=10, targets=9),
        "square": Square(eps=eps, queries=20, give_up=False),
        "own": Shift(0.0),
    }


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (10, ["apgd_t", "fab_t"]),
        (4, ["apgd_t targets=3", "fab_t targets=3"]),
        (3, ["apgd_t targets=2 objective=margin", "fab_t targets=2"]),
        (2, ["apgd_t targets=1 objective=margin", "fab_t targets=1"]),
    ],
)
def test_attacks_fit_the_number_of_classes_and_say_so(classes: int, names: list[str]) -> None:
    suite = Evaluation(suite_of(EPS)).suite(classes, random=False)
    assert [sorted(name.split()) for name in suite] == [
        sorted(name.split()) for name in ("apgd_ce", *names, "square", "own")
    ]
    fitted = [attack for attack in suite.values() if isinstance(attack, APGD)][1]
    assert fitted.targets == min(9, classes - 1)


class Thirds(nn.Module):
    """Three classes by the one pixel, with borders at 1/3 and 2/3."""

    def forward(self, x: Tensor) -> Tensor:
        pixel = 6 * x.flatten(1)
        # Lines of slope 0, 1 and 2 that take over from each other at the borders.
        return torch.cat([pixel * 0, pixel - 2, 2 * pixel - 6], 1)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_suite_is_exact_with_few_classes(classes: int) -> None:
    model = Threshold() if classes == 2 else Thirds()
    borders = torch.tensor([0.5] if classes == 2 else [1 / 3, 2 / 3]).double()
    images = everywhere().images
    # On a border there is no right class.
    images = images[(images.flatten() != 85) & (images.flatten() != 170)]
    pixel = images.flatten().double() / 255
    distance = (pixel[:, None] - borders).abs().amin(1).numpy()
    data = Split(images, torch.bucketize(pixel, borders))
    attacks = suite_of(0.11)
    del attacks["own"]
    outcomes = ledger_of(data, attacks, model.eval(), eps=0.11).outcomes
    assert len(outcomes) == 4
    for name, outcome in outcomes.items():
        assert np.array_equal(outcome.broken, distance <= 0.11), name


# --- what it costs ------------------------------------------------------------------------------

COSTED: dict[str, Attack] = {
    "fgsm": FGSM(eps=EPS),
    "pgd": PGD(eps=EPS, steps=4, restarts=2),
    "apgd": APGD(eps=EPS, steps=5),
    "square": Square(eps=EPS, queries=7),
}


@pytest.mark.parametrize("name", COSTED)
def test_the_report_counts_the_passes_of_the_network(name: str) -> None:
    data, model, counted = everywhere(), network(), {"forward": 0, "backward": 0}

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counted["forward"] += len(output)
        if output.requires_grad:
            output.register_hook(backward)  # type: ignore[no-untyped-call]

    def backward(gradient: Tensor) -> None:
        counted["backward"] += len(gradient)

    model.register_forward_hook(count)
    with torch.no_grad():
        size = 16
        report = ledger_of(data, {name: COSTED[name]}, model, batch_size=size).report(
            Threat(Norm.linf, 0)
        )
    # Beside the attack: four looks for randomness and one for a softmax, one at the images and one
    # at what became of them.
    spent = {"forward": counted["forward"] - 5 * size - 2 * 103, "backward": counted["backward"]}
    rows = report.set_index("attack").to_dict("index")
    for key, passes in spent.items():
        assert passes > 0 or (name, key) == ("square", "backward")
        assert rows[name][key] * 103 == pytest.approx(passes)
    assert (rows["clean"]["forward"], rows["clean"]["backward"]) == (1, 0)
    assert rows["worst_case"]["forward"] == pytest.approx(1 + rows[name]["forward"])


class Steep(nn.Module):
    """Finite logits whose slope is infinite at 0."""

    def forward(self, x: Tensor) -> Tensor:
        root = x.flatten(1).sqrt()
        return torch.cat([0.5 - root, root - 0.5], 1)


def brighter(model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
    """Asks for the model at other images than it returns."""
    model(x + 0.5)
    return x


def sloping(model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
    """Asks for the gradient at the images."""
    with torch.enable_grad():
        point = x.clone().requires_grad_()
        torch.autograd.grad(model(point)[:, 0].sum(), point)
    return x


def test_passes_that_give_no_numbers_are_counted() -> None:
    data = split([0, 100, 140, 200], labels=[0, 0, 0, 0])
    black = split([0, 0, 10], labels=[0, 0, 0])
    cases: list[tuple[Split, Attack, nn.Module, int]] = [
        (data, brighter, NaNAbove(0.9), 2),
        (black, sloping, Steep(), 2),
        (black, sloping, Threshold(), 0),
    ]
    for images, attack, model, met in cases:
        outcome = ledger_of(images, {"attack": attack}, model.eval()).outcomes["attack"]
        assert outcome.non_finite == met


# --- the images that are kept -------------------------------------------------------------------


def images_of(ledger: Ledger) -> "np.ndarray[Any, Any]":
    """The attacked images, of one threat model."""
    assert ledger.adversarial is not None
    (images,) = ledger.adversarial.values()
    return images


def test_the_first_image_that_broke_a_sample_is_kept_or_else_the_nearest() -> None:
    ledger, _ = fates()
    kept = images_of(ledger).flatten() * 255
    # Clean; up; down; down, which came before on; and of those that failed the largest margin lost.
    np.testing.assert_allclose(kept, [200, 151, 99, 77, 71], atol=1e-3)
    with torch.no_grad():
        x_adv = torch.from_numpy(images_of(ledger))
        wrong = Threshold()(x_adv).argmax(1) != torch.tensor(FATES[1])
    assert np.array_equal(wrong.numpy(), ledger.union)


def test_later_images_that_break_a_sample_further_do_not_replace_the_first() -> None:
    attacks: dict[str, Attack] = {"near": Shift(-0.1), "far": Shift(-0.3)}
    kept = images_of(ledger_of(split([150]), attacks))
    np.testing.assert_allclose(kept.flatten() * 255, [124.5], atol=1e-3)
