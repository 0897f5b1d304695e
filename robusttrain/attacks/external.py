"""What the adapters to the attacks of other libraries share."""

import difflib
import inspect
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from robusttrain import ranges, seeding
from robusttrain.attacks import ThreatFields, Traits
from robusttrain.attacks.attack_loss import Loss, cross_entropy
from robusttrain.attacks.images import check_images
from robusttrain.attacks.model_view import frozen
from robusttrain.errors import InputError
from robusttrain.threat import Norm, check_lengths
from robusttrain.threat.balls import ball

Search = Callable[[Tensor, Tensor], Tensor]
"""(images (N, C, H, W), labels (N,)) -> adversarial images."""

# Arguments that other settings determine, or that no plain value fits.
RESERVED = {
    "norm": "norm sets it", "distance": "norm sets it", "constraint": "norm sets it",
    "p": "norm sets it", "eps": "eps sets it", "max_epsilon": "eps sets it", "ε": "eps sets it",
    "targeted": "searches lead away from the label", "n_classes": "the model sets it",
    "num_classes": "the model sets it",
}  # fmt: skip

# The norms as most libraries write them.
ORDERS = {"linf": torch.inf, "l2": 2, "l1": 1}

# Arguments that bound the work of a search.
BUDGETS = (
    "steps", "max_iter", "max_iterations", "n_iter", "nb_iter", "num_iter_set", "num_steps", "iter",
    "n_queries", "binary_search_steps", "n_restarts", "repeats", "directions", "df_steps",
    "search_iter", "max_eval", "init_eval", "init_size", "num_trial", "query_limit",
    "initial_gradient_eval_steps", "max_gradient_eval_steps",
)  # fmt: skip

# Work of a cheap form. Some searches divide by a tenth of their steps.
FEW = 10


class Shown(nn.Module):
    """A model as other libraries see it, which can ask it and change nothing in it.

    Libraries set the mode of a model, delete the gradients of its parameters, move it to a device
    and read the device off a parameter. Here they find one parameter without values, on the
    device of `x`.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        # A closure: torch would register the module itself.
        self.ask: Callable[[Tensor], Tensor] = lambda images: model(images)
        self.place = nn.Parameter(x.new_empty(0), requires_grad=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """The logits (N, K) of the model."""
        # Some compute their points in float64.
        logits: Tensor = self.ask(x.to(self.place.dtype))
        return logits


@contextmanager
def streams_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Let all global random streams start from `seed` in this block, and continue afterwards.

    They are those of torch, NumPy and Python.
    """
    keyed, plain = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            yield
        finally:
            np.random.set_state(keyed)  # noqa: NPY002
            random.setstate(plain)


def drawn_seed(generator: torch.Generator) -> int:
    """A seed that every library takes, below 2^31."""
    return int(torch.randint(2**31, (), generator=generator, device=generator.device))


def classes_of(model: nn.Module, x: Tensor) -> int:
    """How many logits `model` returns, by one pass of one image."""
    with torch.no_grad():
        return int(model(x[:1]).shape[1])


@dataclass
class ExternalAttack(ThreatFields, ABC):
    """Base of the attacks of other libraries: checks names, seeds, and shields the model.

    The model is in eval mode, and `loss` is not asked: each attack has its own objective.

    Parameters
    ----------
    name
        The name of the attack in the library.
    norm, eps
        The threat model; `eps` in pixel units of [0, 1], 0 or more.
    params
        Further arguments of the attack, by their names in the library.
    """

    name: str
    norm: Norm = Norm.linf
    eps: float = 8 / 255
    params: Mapping[str, bool | int | float | str | list[float] | None] = field(
        default_factory=dict
    )

    # The module, and the command that installs it.
    library = ""
    command = ""

    def __post_init__(self) -> None:
        ranges.one_of(list(Norm), norm=self.norm)
        check_lengths(self.norm, eps=self.eps)
        self.norm = Norm(self.norm)
        if find_spec(self.library) is None:
            raise InputError("name", self.name, self.command, f"needs {self.library}")
        known = self.known()
        if self.name not in known:
            problem = f"is not an attack of {self.library}; near it: {_near(self.name, known)}"
            raise InputError("name", self.name, problem=problem)
        self._check_params()
        said = self._tried()
        if said and self.norm not in said:
            problem = f"of {self.library} searches in {' or '.join(said)}, not in norm={self.norm}"
            raise InputError("name", self.name, problem=problem)

    @classmethod
    @abstractmethod
    def known(cls) -> Mapping[str, Callable[..., Any]]:
        """The attacks of the library by their names."""

    @abstractmethod
    def norms(self) -> Collection[str]:
        """The norms in which the attack searches; none where the library does not say it."""

    @abstractmethod
    def prepared(self, model: nn.Module, x: Tensor, seed: int) -> Search:
        """The search on `model`, for images such as `x`."""

    @property
    def traits(self) -> Traits:
        """What kind of an attack it is."""
        return Traits(own_objective=True)

    def frugal(self) -> Self:
        """The same attack with little of everything that bounds its work."""
        found = self.arguments
        own = {key: self.params.get(key, found[key].default) for key in BUDGETS if key in found}
        few = {key: min(n, FEW) for key, n in own.items() if isinstance(n, int)}
        return replace(self, params={**self.params, **few})

    @property
    def arguments(self) -> Mapping[str, inspect.Parameter]:
        """The arguments of the attack by their names."""
        return inspect.signature(self.known()[self.name]).parameters

    def settings(self, **usual: object) -> dict[str, Any]:
        """Those of the `usual` arguments that the attack takes, under what `params` sets."""
        taken = self.arguments
        return {key: value for key, value in usual.items() if key in taken} | dict(self.params)

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        loss: Loss = cross_entropy,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Adversarial images for `x` (N, C, H, W) with labels `y` (N,).

        Raises
        ------
        InputError
            If `x` is not float32 or float64, or has values outside [0, 1].
        """
        check_images(x)
        # Libraries may write into what they get, and take views of it.
        images = x.clone(memory_format=torch.contiguous_format)
        if self.eps == 0 or len(x) == 0:
            return images
        seed = drawn_seed(generator or seeding.fresh(x.device))
        with frozen(model), streams_seeded(seed, x.device), torch.enable_grad():
            search = self.prepared(Shown(model, x), images, seed)
            return search(images, y.clone()).detach().to(x.dtype)

    def projected(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Nearest points of S(x), for attacks that look for the smallest perturbation of any size.

        What they find outside of the ball would otherwise count as invalid.
        """
        return ball(self.threat).project(x_adv.detach().to(x.dtype), x)

    def _check_params(self) -> None:
        taken = [key for key in self.arguments if key not in RESERVED]
        for key, value in self.params.items():
            if key in RESERVED:
                raise InputError(f"params.{key}", value, RESERVED[key], "cannot be set")
            if key not in taken:
                problem = f"is not taken by {self.name} of {self.library}"
                allowed = f"near it: {_near(key, taken)}"
                raise InputError(f"params.{key}", value, allowed, problem)

    def _tried(self) -> Collection[str]:
        """The norms of the attack, once it has been built for an image."""
        image = torch.zeros(1, 2, 1, 1)  # two classes, too
        try:
            # Some refuse radius 0, at which nothing is searched.
            if self.eps > 0:
                self.prepared(Shown(nn.Flatten(), image), image, 0)
            return self.norms()
        # Constructors of other libraries raise errors of all kinds.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            given = "".join(f", {key}={value}" for key, value in self.params.items())
            problem = f"of {self.library} cannot be built for {self.threat}{given}"
            raise InputError("name", self.name, reason, problem) from error


def _near(word: str, known: Collection[str]) -> str:
    return ", ".join(difflib.get_close_matches(word, known, 3, cutoff=0))
