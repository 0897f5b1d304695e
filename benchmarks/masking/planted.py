"""The planted models: what hides, built on networks that are not robust."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from masking import gradients, inputs, outputs, randomness
from masking.base import Masked
from masking.honest import ALL, LINF
from masking.workshop import Recipe, Workshop
from robusttrain.models.small_cnn import SmallCNN
from robusttrain.threat import Norm, Threat

Builder = Callable[[Workshop, Threat], Masked]

# The l2 norm of a uniform linf start, of which the digits' box leaves about this share, in radii.
MOAT = {Norm.linf: 5.0, Norm.l2: 0.9, Norm.l1: 0.5}


class Planted(NamedTuple):
    """How a planted model is built, and in which norms it is tried."""

    build: Builder
    norms: tuple[Norm, ...] = ALL


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


def _moved(shop: Workshop, _: Threat) -> Masked:
    return randomness.MovingTarget(
        [shop.run("defense=standard", f"seed={seed}") for seed in (0, 1, 2)]
    )


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
    "hard_labels_decoy": Planted(lambda s, _: outputs.HardLabels(s.plain(), _decoy())),
    "hard_labels_flat": Planted(lambda s, _: outputs.HardLabelsFlat(s.plain())),
    "top1_only": Planted(lambda s, _: outputs.Top1(s.plain()), LINF),
    "softmax": Planted(lambda s, _: outputs.Softmax(s.plain(), 1), LINF),
    "softmax_of_200z": Planted(lambda s, _: outputs.Softmax(s.plain(), 200)),
    "logits_times_1000": Planted(lambda s, _: outputs.Affine(s.plain(), 1000)),
    "logits_tiny": Planted(lambda s, _: outputs.Affine(s.plain(), 1e-6)),
    "logits_plus_1e4": Planted(lambda s, _: outputs.Affine(s.plain(), 1, 1e4), LINF),
    "logits_plus_1e6": Planted(lambda s, _: outputs.Affine(s.plain(), 1, 1e6), LINF),
    "temperature": Planted(lambda s, _: outputs.Temperature(s.plain()), LINF),
    "rounded_logits": Planted(lambda s, _: outputs.RoundedLogits(s.plain()), LINF),
    "rounded_confidences": Planted(lambda s, _: outputs.RoundedConfidences(s.plain()), LINF),
    "clamped_log": Planted(lambda s, _: outputs.ClampedLog(s.plain()), LINF),
    "output_codes": Planted(lambda s, _: outputs.OutputCodes(s.plain())),
    "frozen_ensemble": Planted(lambda s, _: outputs.FrozenEnsemble(s.plain(), _decoy())),
    # inputs
    "quantised": Planted(lambda s, _: inputs.Quantised(s.plain(), 6)),
    "quantised_straight": Planted(lambda s, _: inputs.Quantised(s.plain(), 6, straight=True), LINF),
    "uint8_cast": Planted(lambda s, _: inputs.Quantised(s.plain(), 256), LINF),
    "jpeg": Planted(lambda s, _: inputs.Jpeg(s.plain())),
    "jpeg_straight": Planted(lambda s, _: inputs.Jpeg(s.plain(), straight=True), LINF),
    "steps_per_pixel": Planted(lambda s, _: inputs.Steps(s.plain())),
    "thermometer": Planted(_thermometer, LINF),
    "ripple": Planted(lambda s, _: inputs.Ripple(s.plain())),
    "purified": Planted(lambda s, _: inputs.Purified(s.plain(), s.training[0]), LINF),
    "soft_binary": Planted(_binary, LINF),
    "bfloat16": Planted(lambda s, _: inputs.Bfloat16(s.plain()), LINF),
    "masked_mantissa": Planted(lambda s, _: inputs.MaskedMantissa(s.plain()), LINF),
    "float16_underflow": Planted(lambda s, _: inputs.Float16Underflow(s.plain()), LINF),
    "off_grid_noise": Planted(lambda s, _: inputs.OffGridNoise(s.plain())),
    "off_grid_nearest": Planted(lambda s, _: inputs.OffGridNearest(s.plain(), *s.training)),
    "nearest_image": Planted(lambda s, _: inputs.NearestImage(*s.training), LINF),
    "memorised": Planted(lambda s, _: inputs.Memorised(s.plain(), *s.testing), LINF),
    "moat": Planted(lambda s, t: inputs.Moat(s.plain(), *s.testing, radius=MOAT[t.norm] * t.eps)),
    "attack_detector": Planted(lambda s, _: inputs.AttackDetector(s.plain(), *s.testing), LINF),
    "rough_detector": Planted(lambda s, _: inputs.Detector(s.plain(), *s.training)),
    # gradients
    "winners_take_all": Planted(_winners),
    "sign_activation": Planted(_signs(gradients.sign_flat), LINF),
    "saturated_tanh": Planted(_signs(gradients.saturated), LINF),
    "reversed_gradient": Planted(_bent(gradients.reversed_)),
    "random_gradient": Planted(_bent(gradients.random)),
    "noisy_gradient": Planted(_bent(gradients.noisy), LINF),
    "rolled_gradient": Planted(_bent(gradients.rolled), LINF),
    "smallest_gradient": Planted(_bent(gradients.smallest), LINF),
    "mirrored_gradient": Planted(_bent(gradients.mirrored), LINF),
    "faint_gradient": Planted(_bent(gradients.underflowing)),
    "nan_branch": Planted(lambda s, _: gradients.NanBranch(s.plain())),
    "nan_off_grid": Planted(lambda s, _: gradients.NanOffGrid(s.plain()), LINF),
    "detached": Planted(lambda s, _: gradients.Detached(s.plain())),
    "grad_mode": Planted(lambda s, _: gradients.GradMode(s.plain(), _decoy())),
    # draws and memory
    "dropout": Planted(
        lambda s, _: randomness.Dropout(s.fitted("dropout", randomness.DropoutNet)), LINF
    ),
    "resized": Planted(_resized, LINF),
    "noisy": Planted(lambda s, _: randomness.Noisy(_noise_trained(s))),
    "pixel_dropout": Planted(lambda s, _: randomness.PixelDropout(_pixels_trained(s)), LINF),
    "random_temperature": Planted(lambda s, _: randomness.RandomTemperature(s.plain()), LINF),
    "logit_noise": Planted(lambda s, _: randomness.LogitNoise(s.plain()), LINF),
    "moving_target": Planted(_moved, LINF),
    "hash_noise": Planted(lambda s, _: randomness.HashNoise(_noise_trained(s))),
    "seeded_forward": Planted(lambda s, _: randomness.SeededForward(_noise_trained(s)), LINF),
    "batch_statistics": Planted(
        lambda s, _: randomness.BatchStatistics(s.fitted("batch_norm", randomness.batch_norm_net)),
        LINF,
    ),
    "remembers": Planted(lambda s, t: randomness.Remembers(s.plain(), _remembered(t))),
    "counts": Planted(lambda s, _: randomness.Counts(s.plain(), *s.testing), LINF),
    "cached": Planted(lambda s, _: randomness.Cached(s.plain()), LINF),
}
