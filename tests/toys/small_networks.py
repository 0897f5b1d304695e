"""Networks of few ReLUs with random weights, in float64, for questions that have exact answers."""

import torch
from torch import Tensor, nn

CLASSES = 3
SHAPE = (1, 4, 4)


def built(*layers: nn.Module, seed: int) -> nn.Sequential:
    """The layers in float64 and eval mode, with weights of this seed."""
    draws = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        for name, values in model.state_dict().items():
            if values.is_floating_point():
                values.copy_(torch.randn(values.shape, generator=draws))
            if name.endswith("running_var"):
                values.abs_().add_(0.5)
    return model


def plain(seed: int) -> nn.Sequential:
    """One of several small networks of affine layers and ReLUs."""
    kinds = [
        lambda: (
            nn.Flatten(1), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(),
            nn.Linear(6, CLASSES),
        ),
        lambda: (
            nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.BatchNorm2d(2), nn.ReLU(),
            nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(1), nn.Linear(3, 6), nn.ReLU(),
            nn.Linear(6, CLASSES),
        ),
        lambda: (
            nn.AvgPool2d(2), nn.Flatten(1), nn.Linear(4, 10), nn.ReLU(), nn.BatchNorm1d(10),
            nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, CLASSES),
        ),
    ]  # fmt: skip
    return built(*kinds[seed % len(kinds)](), seed=seed)


def image(model: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    """An image (1, C, H, W) in float64, and its label: what the model predicts."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.rand(1, *SHAPE, generator=draws, dtype=torch.float64)
    return x, model(x).argmax(1)
