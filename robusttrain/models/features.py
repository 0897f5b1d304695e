"""The features of a classifier: what enters its head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robusttrain.errors import InputError
from robusttrain.models.head import head_of, module_of


def heads_of(model: nn.Module, num_classes: int) -> tuple[nn.Module, ...]:
    """The layers of the head of `model` (`head_of`), whose inputs are the features.

    Raises
    ------
    InputError
        If the model has no head, or if its head is a part of a larger layer.
    """
    parameters, names = dict(model.named_parameters()), head_of(model, num_classes)
    heads = tuple(model.get_submodule(place) for place in dict.fromkeys(map(module_of, names)))
    of_head = {id(parameters[name]) for name in names}
    alone = all(id(parameter) in of_head for head in heads for parameter in head.parameters())
    if not heads or not alone:
        problem = f"has no features: no layer of its own has {num_classes} outputs"
        raise InputError("model", type(model).__name__, problem=problem)
    return heads


class Features(nn.Module):
    """A view of a classifier that returns what enters its head, as rows.

    Parameters
    ----------
    model
        The classifier, which may be wrapped in others.
    heads
        The layers of its head. Their inputs are flattened, and joined if there are several.
    """

    def __init__(self, model: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model, self._heads = model, list(heads)
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, D) of images (N, C, H, W); several rows of an image if it has several draws.

        Raises
        ------
        RuntimeError
            If the model computes its logits without a call of the head.
        """
        seen: list[Tensor] = []

        def keep(head: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen.append(arguments[0].flatten(1))

        hooks = [head.register_forward_pre_hook(keep) for head in self._heads]
        try:
            self.model(x)
        finally:
            for hook in hooks:
                hook.remove()
        if not seen:
            raise RuntimeError("its head is never called, so that nothing is known to enter it")
        return torch.cat(seen, 1)
