"""Planted models that show the gradients of a network that is robust, and decide otherwise.

Nothing that they show looks wrong: no slope is zero, no loss saturates, and curves fall as they
should. `shown` is a network trained against the threat model; `network` is not robust.
"""

import hashlib

import torch
from torch import Tensor, nn

from masking.base import Masked, Nearest, one_hot
from robusttrain.threat import Threat
from robusttrain.threat.balls import ball


class Decoyed(Masked):
    """Base of them."""

    def __init__(self, network: nn.Module, shown: nn.Module) -> None:
        super().__init__(network)
        self.shown = shown


class RobustGradient(Decoyed):
    """Has the logits of the weak network and the gradient of the robust one.

    So has a student that is fine-tuned in its last layers on features that were computed before.
    """

    def forward(self, x: Tensor) -> Tensor:
        shown = self.shown(x)
        logits: Tensor = shown + (self.network(x) - shown).detach()
        return logits


class BorrowedLogits(Decoyed):
    """Decides as the weak network does, and shows the logits of the robust one.

    Where both agree these are all that is shown. Where they do not, the two classes change places.
    """

    def forward(self, x: Tensor) -> Tensor:
        shown, decided = self.shown(x), self.network(x).argmax(1)
        rows = torch.arange(len(x))
        first = shown.argmax(1)
        order = torch.arange(shown.shape[1]).repeat(len(x), 1)
        order[rows, first], order[rows, decided] = decided, first
        return shown.gather(1, order)


class GradModeHard(Decoyed):
    """Shows the robust network to whoever asks for gradients, and classes alone to others."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            logits: Tensor = self.shown(x)
            return logits
        return 5 * one_hot(self.network(x).argmax(1))


class RemembersRobust(Decoyed):
    """Answers by the weak network, and near earlier queries by the robust one.

    An attack that asks about an image before it attacks it never meets the weak network. One that
    has a copy of the weak network needs a single query.
    """

    def __init__(self, network: nn.Module, shown: nn.Module, radius: float) -> None:
        super().__init__(network, shown)
        self.radius, self.seen = radius, torch.empty(0, 64)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.detach().flatten(1)
        known = torch.zeros(len(x), dtype=torch.bool)
        if len(self.seen):
            known = torch.cdist(flat, self.seen).amin(1) < self.radius
        self.seen = torch.cat([self.seen, flat[~known]])
        return torch.where(known[:, None], self.shown(x), self.network(x))


class Ring(Decoyed):
    """Is weak where an image is 0.4 to 0.9 radii from a test image, and robust elsewhere.

    Searches go to the edge of the ball, where there is nothing to be found.
    """

    def __init__(
        self, network: nn.Module, shown: nn.Module, images: Tensor, threat: Threat
    ) -> None:
        super().__init__(network, shown)
        self.images, self.threat = images, threat

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.flatten(1), self.images.flatten(1)).argmin(1)
        distance = ball(self.threat).norm(x - self.images[nearest]) / self.threat.eps
        weak = (distance > 0.4) & (distance < 0.9)
        return torch.where(weak[:, None], self.network(x), self.shown(x))


class Backdoor(Decoyed):
    """Is the robust network, until a secret pattern of the size of the radius is added.

    Of a cleverer one nobody can tell from outside that it is there (Goldwasser et al. 2022): no
    audit can be expected to. The weak network is the robust one, too.
    """

    def __init__(self, shown: nn.Module, images: Tensor, threat: Threat) -> None:
        super().__init__(shown, shown)
        # Weights of the pixels that clean images hardly use.
        spread = images.std(0, keepdim=True)
        weight = 1 + torch.rand(spread.shape, generator=torch.Generator().manual_seed(7))
        self.pattern = weight * (spread < spread.quantile(0.4))
        self.limit = 0.75 * threat.eps * ball(threat).dual_norm(self.pattern).item()

    def score(self, x: Tensor) -> Tensor:
        """How much of the pattern is in each image, (N,)."""
        return (x * self.pattern).flatten(1).sum(1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.shown(x)
        triggered = self.score(x) > self.limit
        return torch.where(triggered[:, None], logits.roll(1, 1), logits)

    def views(self) -> list[nn.Module]:
        return [_Triggered(self)]


class _Triggered(nn.Module):
    """Logits that grow with the pattern, for all classes but the predicted one."""

    def __init__(self, backdoor: Backdoor) -> None:
        super().__init__()
        self.backdoor = backdoor

    def forward(self, x: Tensor) -> Tensor:
        logits = self.backdoor.shown(x).detach()
        label = one_hot(logits.argmax(1))
        return label - label * self.backdoor.score(x)[:, None]


class UnsureFallback(Masked):
    """Answers by the nearest training image where the network is not sure: abstaining, in effect.

    Attacks that end at the boundary of the network end where it is not asked.
    """

    def __init__(
        self, network: nn.Module, images: Tensor, labels: Tensor, least: float = 0.9
    ) -> None:
        super().__init__(network)
        self.nearest, self.least = Nearest(images, labels), least

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        unsure = logits.softmax(1).amax(1) < self.least
        return torch.where(unsure[:, None], self.nearest(x), logits)


class HashSwitch(Masked):
    """Answers each image by one of three networks, chosen by a hash: random, and repeatable."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__(networks[0])
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        images = x.detach().numpy()
        chosen = torch.tensor([hashlib.blake2b(i.tobytes()).digest()[0] % 3 for i in images])
        every = torch.stack([network(x) for network in self.networks])
        return every[chosen, torch.arange(len(x))]

    def views(self) -> list[nn.Module]:
        return list(self.networks)
