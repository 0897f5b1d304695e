"""The honest models, which hide nothing: trained by the command line, or in plain torch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from masking.workshop import Recipe, Workshop
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball, per_image

EPS = {Norm.linf: 0.15, Norm.l2: 0.8, Norm.l1: 2.0}
ALL, LINF = tuple(Norm), (Norm.linf,)


class Honest(NamedTuple):
    """How an honest model is built, its norms, and its suite.

    `eps` is the radius where it is not that of the other models.
    """

    build: Callable[[Workshop, Threat], nn.Module]
    norms: tuple[Norm, ...] = LINF
    eps: float | None = None
    suite: str | None = None


def trained(*words: str, norms: tuple[Norm, ...] = LINF, suite: str | None = None) -> Honest:
    """A run of the command line with these arguments, for the threat model of the row."""
    return Honest(lambda s, t: s.run(*words, *_threat(t)), norms, suite=suite)


def _threat(threat: Threat) -> tuple[str, str]:
    return f"norm={threat.norm}", f"eps={threat.eps:g}"


def _distilled(shop: Workshop, threat: Threat) -> nn.Module:
    madry = "defense=madry", *_threat(threat)
    shop.run(*madry)
    return shop.run(
        "defense=distill", f"defense.teacher={shop.folder_of(*madry)}", *_threat(threat)
    )


def _at_02(*words: str) -> Honest:
    return Honest(lambda s, t: s.run(*words, *_threat(t)), eps=0.2)


class Attention(nn.Module):
    """A transformer over the sixteen patches of 2x2 pixels (after Dosovitskiy et al. 2021)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, 0.0, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.last = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        logits: Tensor = self.last(self.encoder(tokens).mean(1))
        return logits


class Residual(nn.Module):
    """Residual blocks with batch normalisation, as in torchvision's networks."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
                nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
            )
            for _ in range(2)
        )  # fmt: skip
        self.last = nn.Linear(width * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        hidden = self.stem(x)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        pooled = nn.functional.avg_pool2d(hidden.relu(), 2)
        logits: Tensor = self.last(pooled.flatten(1))
        return logits


def sequential() -> nn.Module:
    """Affine layers with ReLU."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


def softplus() -> nn.Module:
    """Convolutions and affine layers that are smooth everywhere."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, padding=1), nn.Softplus(10), nn.Conv2d(16, 32, 3, 2, padding=1),
        nn.Softplus(10), nn.Flatten(), nn.Linear(128, 64), nn.Softplus(10), nn.Linear(64, 10),
    )  # fmt: skip


def _foreign(
    name: str, make: Callable[[], nn.Module], *, robust: bool, rate: float = 2e-3
) -> Honest:
    def build(shop: Workshop, threat: Threat) -> nn.Module:
        if not robust:
            return shop.fitted(name, make, Recipe(20, rate))
        recipe = Recipe(20, rate, adversarial=_pgd(threat))
        return shop.fitted(f"{name}_{threat.norm}_{threat.eps:g}", make, recipe)

    return Honest(build)


def _pgd(threat: Threat, steps: int = 7) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Adversarial training in plain torch, in train mode, as is common."""
    here = ball(threat)

    def adversarial(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        points = here.project(x + threat.eps * (2 * torch.rand_like(x) - 1), x)
        for _ in range(steps):
            points.requires_grad_()
            loss = nn.functional.cross_entropy(network(points), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, points)
            step = per_image(torch.full((len(x),), 2.5 * threat.eps / steps), x)
            points = here.project(points.detach() + step * here.steepest(gradient), x)
        return points

    return adversarial


HONEST: dict[str, Honest] = {
    "standard": trained("defense=standard", norms=ALL),
    "fgsm": trained("defense=fgsm", norms=(Norm.linf, Norm.l2)),
    "alpha_mix": trained("defense=alpha_mix", "attack=pgd"),
    "madry": trained("defense=madry", norms=ALL),
    "trades": trained("defense=trades", norms=ALL),
    "mart": trained("defense=mart"),
    "alp": trained("defense=alp"),
    "free": trained("defense=free", norms=(Norm.linf, Norm.l2)),
    "fgsm_rs": trained("defense=fgsm_rs"),
    "rt": trained("defense=rt", norms=(Norm.linf, Norm.l1)),
    "lsa": trained("defense=lsa"),
    "n_fgsm": trained("defense=n_fgsm"),
    "grad_align": trained("defense=grad_align"),
    "friendly": trained("defense=friendly"),
    "ibp": trained(
        "defense=ibp", "epochs=40", "training.curriculum.eps_warmup=0.5",
        "training.curriculum.per_batch=true",
    ),
    "distill": Honest(_distilled),
    "madry_1_epoch": trained("defense=madry", "epochs=1"),
    "madry_2_epochs": trained("defense=madry", "epochs=2", norms=(Norm.linf, Norm.l2)),
    "trades_mlp": trained("defense=trades", "model=mlp"),
    **{f"madry_0.2_seed_{s}": _at_02("defense=madry", f"seed={s}") for s in range(4)},
    "gaussian": trained("defense=madry", "noise=gaussian", "noise.predict=true", suite="eot"),
    "pni_w": trained("defense=alpha_mix", "attack=pgd", "noise=pni_w", suite="eot"),
    "sequential": _foreign("sequential", sequential, robust=False),
    "residual": _foreign("residual", Residual, robust=False),
    "attention": _foreign("attention", Attention, robust=False),
    "softplus": _foreign("softplus", softplus, robust=False),
    "sequential_pgd": _foreign("sequential", sequential, robust=True),
    "residual_pgd": _foreign("residual", Residual, robust=True),
    "attention_pgd": _foreign("attention", Attention, robust=True),
    "softplus_pgd": _foreign("softplus", softplus, robust=True),
}  # fmt: skip
