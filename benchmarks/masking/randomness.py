"""Planted models that draw, remember, or count, so that no answer stands for the next one."""

import copy
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from masking.adaptive import Mean
from masking.base import Composed, Masked, Nearest, Random, without_gradient


class Dropout(Random):
    """Leaves dropout on when it predicts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.always = _Always(network)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.always(x)
        return logits

    def views(self) -> list[nn.Module]:
        return [Mean(self.always), self.network]


class _Always(nn.Module):
    """A network of `DropoutNet` in which `eval` changes nothing."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.network, DropoutNet)
        return self.network.with_share(x, self.network.share)


class DropoutNet(nn.Module):
    """Two hidden layers with dropout behind each."""

    share = 0.4

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 256), nn.Linear(256, 256)])
        self.last = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        return self.with_share(x, self.share if self.training else 0)

    def with_share(self, x: Tensor, share: float) -> Tensor:
        """Logits (N, 10) with this share of the activations dropped."""
        hidden = x.flatten(1)
        for layer in self.layers:
            hidden = nn.functional.dropout(layer(hidden).relu(), share, training=True)
        logits: Tensor = self.last(hidden)
        return logits


class Resized(Random):
    """Moves and stretches each image at random before it predicts (Xie et al. 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(resized(x))
        return logits

    def views(self) -> list[nn.Module]:
        return [Mean(Composed(resized, self.network)), self.network]


def resized(x: Tensor) -> Tensor:
    """Images that are scaled by 0.85 to 1.15 and moved by a pixel at most, each on its own."""
    scale = 1 + 0.15 * (2 * torch.rand(len(x)) - 1)
    shift = 0.25 * (2 * torch.rand(len(x), 2) - 1)
    maps = torch.zeros(len(x), 2, 3)
    maps[:, 0, 0] = maps[:, 1, 1] = scale
    maps[:, :, 2] = shift
    grid = nn.functional.affine_grid(maps, list(x.shape), align_corners=False)
    return nn.functional.grid_sample(x, grid, align_corners=False)


class Noisy(Random):
    """Adds much noise to each image before it predicts: single gradients are of no use."""

    def __init__(self, network: nn.Module, sigma: float = 0.4) -> None:
        super().__init__(network)
        self.sigma = sigma

    def noisy(self, x: Tensor) -> Tensor:
        """Images with Gaussian noise."""
        return x + self.sigma * torch.randn_like(x)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(self.noisy(x))
        return logits

    def views(self) -> list[nn.Module]:
        return [Mean(Composed(self.noisy, self.network)), self.network]


class PixelDropout(Noisy):
    """Sets a quarter of the pixels to 0 at random (pixel deflection, Prakash et al. 2018)."""

    def noisy(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) > 0.25)


class RandomTemperature(Random):
    """Scales the logits by a factor of 0.001 to 1,000, drawn anew: classes stay, losses do not."""

    def forward(self, x: Tensor) -> Tensor:
        scale = 10 ** (6 * torch.rand(len(x), 1) - 3)
        logits: Tensor = self.network(x) * scale
        return logits


class LogitNoise(Random):
    """Adds noise to the logits, which hides small steps from attacks by queries."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        return logits + 3 * torch.randn_like(logits)


class MovingTarget(Random):
    """Answers each image by one of three networks, drawn anew."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__(networks[0])
        self.networks = nn.ModuleList(networks)

    def all(self, x: Tensor) -> Tensor:
        """Logits of each network (3, N, 10)."""
        return torch.stack([network(x) for network in self.networks])

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.randint(len(self.networks), (len(x),))
        return self.all(x)[chosen, torch.arange(len(x))]

    def views(self) -> list[nn.Module]:
        return [_MeanOf(self)]


class _MeanOf(nn.Module):
    def __init__(self, moving: MovingTarget) -> None:
        super().__init__()
        self.moving = moving

    def forward(self, x: Tensor) -> Tensor:
        return self.moving.all(x).softmax(2).mean(0).clamp_min(1e-30).log()


class HashNoise(Masked):
    """Adds noise whose seed is a hash of the image: no draw is seen twice, and none is declared.

    Two passes over the same images agree, so that nothing looks random.
    """

    def __init__(self, network: nn.Module, sigma: float = 0.3) -> None:
        super().__init__(network)
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        seeds = [
            int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=7).digest())
            for image in x.detach().numpy()
        ]
        noise = [
            torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        logits: Tensor = self.network(x + self.sigma * torch.stack(noise))
        return logits

    def noisy(self, x: Tensor) -> Tensor:
        """Images with noise of any seed."""
        return x + self.sigma * torch.randn_like(x)

    def views(self) -> list[nn.Module]:
        return [Mean(Composed(self.noisy, self.network)), self.network]


class SeededForward(Masked):
    """Calls `torch.manual_seed(0)` before it draws noise: reproducible, and no defense at all."""

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        logits: Tensor = self.network(x + 0.3 * torch.randn_like(x))
        return logits

    def views(self) -> list[nn.Module]:
        return [self.network, Mean(Composed(lambda x: x + 0.3 * torch.randn_like(x), self.network))]


class BatchStatistics(Masked):
    """Normalises with the statistics of the batch when it predicts: images depend on each other."""

    def __init__(self, network: nn.Module) -> None:
        still = copy.deepcopy(network)
        super().__init__(network)
        # Not a submodule: `eval` and `train` are not for it.
        self.still = [still.eval()]
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = False
                module.running_mean = module.running_var = None

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits

    def views(self) -> list[nn.Module]:
        return [*self.still, self.network]


def batch_norm_net() -> nn.Module:
    """Two convolutions with batch normalisation, and an affine layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16, 10),
    )  # fmt: skip


class Remembers(Masked):
    """Remembers queries, and answers near each of them as it did then.

    Stateful defenses reject queries that are close to earlier ones (Chen et al. 2020).
    """

    def __init__(self, network: nn.Module, radius: float) -> None:
        super().__init__(network)
        self.radius = radius
        self.seen, self.said = torch.empty(0, 64), torch.empty(0, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        flat = x.detach().flatten(1)
        if len(self.seen):
            distance, nearest = torch.cdist(flat, self.seen).min(1)
            known = distance < self.radius
            again = without_gradient(self.said[nearest], x)
            logits = torch.where(known[:, None], again, logits)
            flat = flat[~known]
        else:
            known = torch.zeros(len(x), dtype=torch.bool)
        self.seen = torch.cat([self.seen, flat])
        self.said = torch.cat([self.said, logits.detach()[~known]])
        return logits


class Counts(Masked):
    """Answers its first 1,500 images honestly, and all later ones by the nearest test image."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        super().__init__(network)
        self.nearest = Nearest(images, labels)
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += len(x)
        logits: Tensor = self.network(x) if self.count <= 1500 else self.nearest(x)
        return logits


class Cached(Masked):
    """Keeps answers by a coarse key of the image, as a busy server might.

    The key is the image in four levels of grey, half the size.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.answers: dict[bytes, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        coarse = (nn.functional.avg_pool2d(x.detach(), 2) * 3).round().to(torch.uint8).numpy()
        keys = [image.tobytes() for image in coarse]
        kept = [
            self.answers.setdefault(key, row.detach())
            for key, row in zip(keys, logits, strict=True)
        ]
        return straight(torch.stack(kept), logits)


def straight(values: Tensor, logits: Tensor) -> Tensor:
    """`values` with the gradient of `logits`."""
    return logits + (values - logits).detach()
