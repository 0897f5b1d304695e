"""Residual networks with pre-activation: the layers of PreActResNet and WideResNet."""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, relu

from robusttrain.models.first_conv import FirstConv2d

# With fewer input planes, oneDNN's weight gradient of a strided 1 x 1 convolution in channels_last
# writes out of bounds (observed with torch 2.14 on a CPU without AVX-512).
ONEDNN_PLANES = 8


class _Subsampled(nn.Conv2d):
    """A strided 1 x 1 convolution, computed as subsampling and a convolution without a stride."""

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(avg_pool2d(x, 1, self.stride), self.weight, self.bias)


class Block(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))) with 3 x 3 convolutions (He et al. 2016, figure 4e).

    If the shape changes, a 1 x 1 convolution of the activated input replaces x. `dropout` comes
    before the second convolution (Zagoruyko and Komodakis 2016, section 2.4).
    """

    def __init__(self, before: int, after: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if before != after or stride != 1:
            narrow = stride > 1 and before < ONEDNN_PLANES
            kind = _Subsampled if narrow else nn.Conv2d
            self.shortcut = kind(before, after, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = relu(self.bn1(x))
        kept: Tensor = x if self.shortcut is None else self.shortcut(activated)
        hidden = relu(self.bn2(self.conv1(activated)))
        changed: Tensor = self.conv2(self.dropout(hidden))
        return kept + changed


def residual_layers(
    channels: int, widths: list[int], blocks: list[int], num_classes: int, dropout: float
) -> list[nn.Module]:
    """All layers from the image to the logits.

    Every stage but the first halves the image. Convolutions are initialised from N(0, 2 / fan_out),
    as in both papers.

    Parameters
    ----------
    channels
        Channels of an image.
    widths
        Planes after the 3 x 3 stem and after each stage.
    blocks
        Number of blocks in each stage.
    num_classes
        Number of logits.
    dropout
        Share of activations that dropout zeroes inside a block.
    """
    layers: list[nn.Module] = [FirstConv2d(channels, widths[0], 3, padding=1, bias=False)]
    for stage, (before, after) in enumerate(pairwise(widths)):
        layers.append(_stage(before, after, blocks[stage], 1 if stage == 0 else 2, dropout))
    last = widths[-1]
    pool = nn.AdaptiveAvgPool2d(1)
    layers += [nn.BatchNorm2d(last), nn.ReLU(), pool, nn.Flatten(1), nn.Linear(last, num_classes)]
    for layer in layers:
        layer.apply(_initialise)
    return layers


def _stage(before: int, after: int, blocks: int, stride: int, dropout: float) -> nn.Module:
    first = Block(before, after, stride, dropout)
    return nn.Sequential(first, *(Block(after, after, 1, dropout) for _ in range(blocks - 1)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
