"""The planted models: what hides, built on networks that are not robust."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from masking import decoys, gradients, inputs, outputs, randomness
from masking.base import Masked
from masking.honest import ALL
from masking.workshop import Recipe, Workshop
from robusttrain.models.small_cnn import SmallCNN
from robusttrain.threat import Norm, Threat

Builder = Callable[[Workshop, Threat], Masked]

# The l2 norm of a uniform linf start, of which the digits' box leaves about this share, in radii.
MOAT = {Norm.linf: 5.0, Norm.l2: 0.9, Norm.l1: 0.5}


class Planted(NamedTuple):
    """How a planted model is built, and in which norms it is tried."""

    build: Builder
    norms: tuple[Norm, ...] = (Norm.linf,)


def _decoy() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return SmallCNN().build(10, (1, 8, 8)).eval()


def _bent(bend: gradients.Bend) -> Builder:
    return lambda shop, _: gradients.BentGradient(shop.plain(), bend)


def _winners(shop: Workshop, _: Threat) -> Masked:
    network = shop.fitted("winners", lambda: gradients.Hidden(gradients.winners))
    return gradients.WinnersTakeAll(network)


def _signs(activation: gradients.Activation) -> Builder:
    def build(shop: Workshop, _: Threat) -> Masked:
        network = shop.fitted("signs", lambda: gradients.Hidden(gradients.sign_through))
        assert isinstance(network, gradients.Hidden)
        climbed = [gradients.sign_through, gradients.soft_sign]
        return gradients.OtherActivation(network, activation, climbed)

    return build


def _binary(shop: Workshop, _: Threat) -> Masked:
    def make() -> torch.nn.Module:
        return inputs.SoftBinary(SmallCNN().build(10, (1, 8, 8)), 20)

    network = shop.fitted("binary", make)
    return inputs.SoftBinary(network.network)  # type: ignore[arg-type]


def _thermometer(shop: Workshop, _: Threat) -> Masked:
    def make() -> torch.nn.Module:
        return inputs.Thermometer(SmallCNN().build(10, (10, 8, 8)))

    trained = shop.fitted("thermometer", make)
    assert isinstance(trained, Masked)
    return trained


def _resized(shop: Workshop, _: Threat) -> Masked:
    recipe = Recipe(30, adversarial=lambda network, x, y: randomness.resized(x))
    return randomness.Resized(shop.fitted("resized", _small, recipe))


def _small() -> torch.nn.Module:
    return SmallCNN().build(10, (1, 8, 8))


def _robust(shop: Workshop, threat: Threat) -> torch.nn.Module:
    return shop.run("defense=madry", f"norm={threat.norm}", f"eps={threat.eps:g}")


def _plain_networks(shop: Workshop) -> list[torch.nn.Module]:
    return [shop.run("defense=standard", f"seed={seed}") for seed in (0, 1, 2)]


def _noise_trained(shop: Workshop) -> torch.nn.Module:
    recipe = Recipe(30, adversarial=lambda network, x, y: x + 0.3 * torch.randn_like(x))
    return shop.fitted("noise", _small, recipe)


def _pixels_trained(shop: Workshop) -> torch.nn.Module:
    recipe = Recipe(30, adversarial=lambda network, x, y: x * (torch.rand_like(x) > 0.25))
    return shop.fitted("pixels", _small, recipe)


# In l2, of an image: nearer than this to an earlier query counts as the same.
def _remembered(threat: Threat) -> float:
    return threat.eps * (9 if threat.norm is Norm.linf else 1.1)


PLANTED: dict[str, Planted] = {
    # outputs
    "hard_labels_decoy": Planted(lambda s, _: outputs.HardLabels(s.plain(), _decoy()), ALL),
    "hard_labels_flat": Planted(lambda s, _: outputs.HardLabelsFlat(s.plain())),
    "top1_only": Planted(lambda s, _: outputs.Top1(s.plain())),
    "softmax": Planted(lambda s, _: outputs.Softmax(s.plain(), 1)),
    "softmax_of_200z": Planted(lambda s, _: outputs.Softmax(s.plain(), 200), ALL),
    "logits_times_1000": Planted(lambda s, _: outputs.Affine(s.plain(), 1000)),
    "logits_tiny": Planted(lambda s, _: outputs.Affine(s.plain(), 1e-6), ALL),
    "logits_plus_1e4": Planted(lambda s, _: outputs.Affine(s.plain(), 1, 1e4)),
    "logits_plus_1e6": Planted(lambda s, _: outputs.Affine(s.plain(), 1, 1e6)),
    "temperature": Planted(lambda s, _: outputs.Temperature(s.plain())),
    "rounded_logits": Planted(lambda s, _: outputs.RoundedLogits(s.plain())),
    "rounded_confidences": Planted(lambda s, _: outputs.RoundedConfidences(s.plain())),
    "clamped_log": Planted(lambda s, _: outputs.ClampedLog(s.plain())),
    "output_codes": Planted(lambda s, _: outputs.OutputCodes(s.plain())),
    "frozen_ensemble": Planted(lambda s, _: outputs.FrozenEnsemble(s.plain(), _decoy())),
    # inputs
    "quantised": Planted(lambda s, _: inputs.Quantised(s.plain(), 6), ALL),
    "quantised_straight": Planted(lambda s, _: inputs.Quantised(s.plain(), 6, straight=True)),
    "uint8_cast": Planted(lambda s, _: inputs.Quantised(s.plain(), 256)),
    "jpeg": Planted(lambda s, _: inputs.Jpeg(s.plain())),
    "jpeg_straight": Planted(lambda s, _: inputs.Jpeg(s.plain(), straight=True)),
    "steps_per_pixel": Planted(lambda s, _: inputs.Steps(s.plain())),
    "thermometer": Planted(_thermometer),
    "ripple": Planted(lambda s, _: inputs.Ripple(s.plain()), ALL),
    "purified": Planted(lambda s, _: inputs.Purified(s.plain(), s.training[0])),
    "soft_binary": Planted(_binary),
    "bfloat16": Planted(lambda s, _: inputs.Bfloat16(s.plain())),
    "masked_mantissa": Planted(lambda s, _: inputs.MaskedMantissa(s.plain())),
    "float16_underflow": Planted(lambda s, _: inputs.Float16Underflow(s.plain())),
    "off_grid_noise": Planted(lambda s, _: inputs.OffGridNoise(s.plain()), ALL),
    "off_grid_nearest": Planted(lambda s, _: inputs.OffGridNearest(s.plain(), *s.training)),
    "nearest_image": Planted(lambda s, _: inputs.NearestImage(*s.training)),
    "memorised": Planted(lambda s, _: inputs.Memorised(s.plain(), *s.testing)),
    "moat": Planted(
        lambda s, t: inputs.Moat(s.plain(), *s.testing, radius=MOAT[t.norm] * t.eps), ALL
    ),
    "attack_detector": Planted(lambda s, _: inputs.AttackDetector(s.plain(), *s.testing)),
    "rough_detector": Planted(lambda s, _: inputs.Detector(s.plain(), *s.training)),
    # gradients
    "winners_take_all": Planted(_winners, ALL),
    "sign_activation": Planted(_signs(gradients.sign_flat)),
    "saturated_tanh": Planted(_signs(gradients.saturated)),
    "reversed_gradient": Planted(_bent(gradients.reversed_), ALL),
    "random_gradient": Planted(_bent(gradients.random)),
    "noisy_gradient": Planted(_bent(gradients.noisy)),
    "rolled_gradient": Planted(_bent(gradients.rolled)),
    "smallest_gradient": Planted(_bent(gradients.smallest)),
    "mirrored_gradient": Planted(_bent(gradients.mirrored)),
    "faint_gradient": Planted(_bent(gradients.underflowing), ALL),
    "nan_branch": Planted(lambda s, _: gradients.NanBranch(s.plain()), ALL),
    "nan_off_grid": Planted(lambda s, _: gradients.NanOffGrid(s.plain())),
    "detached": Planted(lambda s, _: gradients.Detached(s.plain())),
    "grad_mode": Planted(lambda s, _: gradients.GradMode(s.plain(), _decoy())),
    # draws and memory
    "dropout": Planted(lambda s, _: randomness.Dropout(s.fitted("dropout", randomness.DropoutNet))),
    "resized": Planted(_resized),
    "noisy": Planted(lambda s, _: randomness.Noisy(_noise_trained(s)), ALL),
    "pixel_dropout": Planted(lambda s, _: randomness.PixelDropout(_pixels_trained(s))),
    "random_temperature": Planted(lambda s, _: randomness.RandomTemperature(s.plain())),
    "logit_noise": Planted(lambda s, _: randomness.LogitNoise(s.plain())),
    "moving_target": Planted(lambda s, _: randomness.MovingTarget(_plain_networks(s))),
    "hash_noise": Planted(lambda s, _: randomness.HashNoise(_noise_trained(s)), ALL),
    "seeded_forward": Planted(lambda s, _: randomness.SeededForward(_noise_trained(s))),
    "batch_statistics": Planted(
        lambda s, _: randomness.BatchStatistics(s.fitted("batch_norm", randomness.batch_norm_net)),
    ),
    "remembers": Planted(lambda s, t: randomness.Remembers(s.plain(), _remembered(t)), ALL),
    "counts": Planted(lambda s, _: randomness.Counts(s.plain(), *s.testing)),
    "cached": Planted(lambda s, _: randomness.Cached(s.plain())),
    # decoys that are robust
    "robust_gradient": Planted(lambda s, t: decoys.RobustGradient(s.plain(), _robust(s, t))),
    "borrowed_logits": Planted(lambda s, t: decoys.BorrowedLogits(s.plain(), _robust(s, t)), ALL),
    "grad_mode_hard": Planted(lambda s, t: decoys.GradModeHard(s.plain(), _robust(s, t))),
    "remembers_robust": Planted(
        lambda s, t: decoys.RemembersRobust(s.plain(), _robust(s, t), _remembered(t))
    ),
    "ring": Planted(lambda s, t: decoys.Ring(s.plain(), _robust(s, t), s.testing[0], t)),
    "backdoor": Planted(lambda s, t: decoys.Backdoor(_robust(s, t), s.training[0], t)),
    "unsure_fallback": Planted(lambda s, _: decoys.UnsureFallback(s.plain(), *s.training)),
    "hash_switch": Planted(lambda s, _: decoys.HashSwitch(_plain_networks(s))),
}
