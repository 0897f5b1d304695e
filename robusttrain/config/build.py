"""From YAML and command line to objects: schemas, fractions, and building with clear refusals."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from enum import Enum, StrEnum
from types import ModuleType, NoneType, UnionType
from typing import Any, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

import torch
from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from robusttrain import ranges, seeding
from robusttrain.attacks import Attack
from robusttrain.data import Dataset, Info
from robusttrain.defenses import Defense
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation
from robusttrain.evaluation.certification import Certification
from robusttrain.loggers import Logger
from robusttrain.models import Architecture, build_model, dry_run
from robusttrain.noise import Noise, drawing_from
from robusttrain.optim.averaging import Averaging
from robusttrain.optim.optimizers import Optimizer
from robusttrain.optim.schedules import Schedule
from robusttrain.optim.weight_perturbation import WeightPerturbation
from robusttrain.runtime import distributed
from robusttrain.threat import Norm
from robusttrain.training.settings import Training


class Group(NamedTuple):
    """A config group: where its components are defined, and the method that makes one of them.

    The place is a package of one file each, or one module. Of settings, which only hold values, all
    are components.
    """

    place: str
    method: str | None


GROUPS = {
    "attack": Group("robusttrain.attacks", "__call__"),
    "averaging": Group("robusttrain.optim.averaging", "share"),
    "dataset": Group("robusttrain.data", "load"),
    "defense": Group("robusttrain.defenses", "__call__"),
    "evaluation": Group("robusttrain.evaluation.attack_suite", None),
    "logger": Group("robusttrain.loggers", "record"),
    "model": Group("robusttrain.models", "build"),
    "noise": Group("robusttrain.noise", "install"),
    "optimizer": Group("robusttrain.optim.optimizers", "build"),
    "schedule": Group("robusttrain.optim.schedules", "build"),
    "training": Group("robusttrain.training.settings", None),
    "weight_perturbation": Group("robusttrain.optim.weight_perturbation", "at"),
}

# What a defense is combined with, and goes by in a report unless it is `NOTHING`.
COMPANIONS, NOTHING = ("weight_perturbation", "averaging"), "none"

# Keys in pixel units, which may be given as a fraction.
PIXEL_KEYS = ("eps", "step_size", "sigma")


class Stage(StrEnum):
    """A part of a run."""

    train = "train"
    evaluate = "evaluate"


@dataclasses.dataclass
class Config:
    """A run, with every component built.

    Parameters
    ----------
    norm, eps
        The threat model that attacks, defenses and evaluation share unless told otherwise; `eps`
        in pixel units of [0, 1].
    seed
        From which every random stream is derived, 0 or more.
    device
        `auto` (CUDA where there is one), or a device of torch: cpu, cuda, cuda:1, mps.
    epochs, batch_size
        Passes over the training split, and images a step of each process.
    stages
        What to do, of train and evaluate.
    checkpoint
        A saved model to evaluate, or to train further from; somebody else's state dict, TorchScript
        file or exported program to evaluate.
    resume
        The directory of a run to go on with, which was stopped or killed, or `auto`: the newest
        unfinished one of this command. The command line takes the configuration from there.
    deterministic
        Whether torch uses algorithms only that give the same bits every time.
    keep_memory
        Whether the process keeps freed memory for its next tensors (glibc only; for speed).
    data_dir, download
        Where data sets lie, and whether missing ones are downloaded to there.
    trust
        Packages of yours whose classes may be built from a checkpoint's configuration.
    """

    dataset: Dataset
    model: Architecture
    noise: Noise
    attack: Attack
    defense: Defense
    optimizer: Optimizer
    schedule: Schedule
    weight_perturbation: WeightPerturbation
    averaging: Averaging
    training: Training
    evaluation: Evaluation
    logger: Logger
    norm: Norm = Norm.linf
    eps: float = 0.1
    seed: int = 0
    epochs: int = 20
    batch_size: int = 128
    device: str = "auto"
    stages: list[Stage] = dataclasses.field(default_factory=lambda: list(Stage))
    checkpoint: str | None = None
    resume: str | None = None
    deterministic: bool = False
    keep_memory: bool = True
    data_dir: str = "data"
    download: bool = True
    trust: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        ranges.at_least(0, eps=self.eps, seed=self.seed)
        ranges.require(bool(self.stages), "stages", [], "at least one of train, evaluate")
        ranges.require(
            Stage.train in self.stages or self.checkpoint is not None,
            "stages",
            "[evaluate]",
            "combined with checkpoint=..., or contain train",
        )
        self.training.curriculum.at(self.defense, 1, max(1, self.training.epochs))
        self.torch_device()

    def torch_device(self) -> torch.device:
        """The device that `device` stands for; of several processes each has a GPU of its own."""
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if distributed.size() > 1:
            name = self._own_device(name)
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            allowed = f"auto, cpu, or a device that is present ({_first_line(error)})"
            raise InputError(
                f"device={self.device} is not allowed: it must be {allowed}"
            ) from error
        return device

    def _own_device(self, name: str) -> str:
        many = f"with {distributed.size()} processes"
        ranges.require(name in ("cpu", "cuda"), "device", name, f"auto, cpu or cuda {many}")
        if name == "cpu":
            return name
        here = torch.cuda.device_count()
        allowed = f"cpu, or --nproc_per_node at most {here}, as there are {here} of them"
        ranges.require(distributed.local_rank() < here, "device", name, allowed)
        return f"cuda:{distributed.local_rank()}"


def register() -> None:
    """Make the schema of every component known to Hydra, as `schema/<group>/<class>`."""
    store = ConfigStore.instance()
    store.store(group="schema", name="Config", node=schema(Config))
    for group in GROUPS:
        for component in components(group):
            store.store(group=f"schema/{group}", name=component.__name__, node=schema(component))


def schema(component: type) -> type:
    """A structured config with the fields of a component, and its class as `_target_`."""
    hints = get_type_hints(component)
    target = ("_target_", str, dataclasses.field(default=_path(component)))
    members = [
        (member.name, *_schema_field(member, hints[member.name]))
        for member in dataclasses.fields(component)
        if member.init
    ]
    return dataclasses.make_dataclass(component.__name__, [target, *members])


def with_numbers(config: DictConfig) -> DictConfig:
    """The configuration with fractions such as eps=8/255 as numbers.

    Raises
    ------
    InputError
        If a key in pixel units is neither a number nor a fraction.
    """
    plain = OmegaConf.to_container(config, resolve=False)
    return cast(DictConfig, OmegaConf.create(_with_numbers(plain, "")))


def build(config: DictConfig) -> Config:
    """Build every component; nothing is loaded or computed yet.

    Raises
    ------
    InputError
        If a component refuses a value; the message starts with the full key.
    """
    for group in GROUPS:
        if "_target_" not in config[group]:
            raise InputError(f"{group} names no class: its YAML lacks a _target_")
    return cast(Config, build_component(config))


def build_component(config: DictConfig) -> Any:
    """Build the object that a node with a `_target_` describes."""
    try:
        return instantiate(config, _convert_="all")
    except InstantiationException as error:
        raise InputError(_refusal(config, error)) from error


def network(architecture: Architecture, noise: Noise, info: Info, seed: int) -> torch.nn.Module:
    """A freshly initialised model for the images of `info`, with its noise, on the CPU.

    Raises
    ------
    InputError
        If the architecture cannot take such images, or has no place for the noise.
    """
    # Initialisation draws from the global stream; it is the only thing that may.
    torch.manual_seed(seeding.derived_seed(seed, "initialisation"))
    model = build_model(architecture, info.num_classes, info.image_shape)
    noise.install(model, seeding.derived_seed(seed, "noise"))
    # Noise with a size for every activation takes its shape from the first images that it sees.
    with drawing_from(model, seed):
        dry_run(model, info.image_shape)
    return model


def components(group: str) -> list[type]:
    """What a YAML of `group` can name: the dataclasses there that have the method of the group.

    A base that leaves a method to its subclasses is none.
    """
    place, method = GROUPS[group]
    found = [
        component
        for component in _dataclasses(importlib.import_module(place))
        if not inspect.isabstract(component) and (method is None or method in dir(component))
    ]
    return [*found, Certification] if group == "evaluation" else found


def _dataclasses(place: ModuleType) -> Iterator[type]:
    """Public dataclasses of a module, or of the modules of a package."""
    inside = getattr(place, "__path__", None)
    names = [m.name for m in pkgutil.iter_modules(inside)] if inside else []
    modules = [importlib.import_module(f"{place.__name__}.{name}") for name in names] or [place]
    for module in modules:
        for name, value in vars(module).items():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and dataclasses.is_dataclass(value) and not name.startswith("_"):
                yield cast(type, value)


def _schema_field(member: "dataclasses.Field[Any]", hint: Any) -> tuple[Any, Any]:
    if member.default_factory is hint and dataclasses.is_dataclass(hint):
        nested = schema(hint)
        return nested, dataclasses.field(default_factory=nested)
    if member.default_factory is not dataclasses.MISSING:
        default = dataclasses.field(default_factory=member.default_factory)
    elif member.default is not dataclasses.MISSING:
        default = dataclasses.field(default=member.default)
    else:
        default = dataclasses.field(default="???")
    return (hint if member.name not in PIXEL_KEYS and _is_plain(hint) else Any), default


def _is_plain(hint: Any) -> bool:
    """Whether OmegaConf can check a type: scalars, enums, lists of them, and optional ones."""
    if get_origin(hint) in (Union, UnionType, list):
        return all(_is_plain(argument) for argument in get_args(hint))
    return hint in (bool, int, float, str, NoneType) or (
        inspect.isclass(hint) and issubclass(hint, Enum)
    )


def _path(component: type) -> str:
    return f"{component.__module__}.{component.__qualname__}"


def _with_numbers(node: Any, where: str) -> Any:
    if isinstance(node, dict):
        return {
            key: _pixels(f"{where}{key}", value)
            if key in PIXEL_KEYS
            else _with_numbers(value, f"{where}{key}.")
            for key, value in node.items()
        }
    return node


def _pixels(key: str, value: Any) -> Any:
    """A number from a number or a fraction; interpolations, and a step size left out, stay."""
    left_out = value is None and key.endswith("step_size")
    if left_out or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    if isinstance(value, str) and (value == "???" or "${" in value):
        return value
    try:
        numerator, _, denominator = str(value).partition("/")
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        allowed = "a number or a fraction such as 0.03 or 8/255"
        raise InputError(f"{key}={value} is not allowed: it must be {allowed}") from None


def _refusal(config: DictConfig, error: InstantiationException) -> str:
    """One line from an exception that Hydra wrapped: the full key, then what the component said."""
    found = re.search(r"full_key: (\S+)", str(error))
    where = found[1] if found else ""
    cause = error.__cause__
    if isinstance(cause, InputError):
        return _at_its_source(config, where, str(cause))
    # Where a class cannot be imported, Hydra says why in the second line.
    reason = " ".join(str(cause or error).splitlines()[:2])
    return f"{where or 'config'}: {reason or type(cause).__name__}"


def _at_its_source(config: DictConfig, where: str, message: str) -> str:
    """A message that starts with a key of the node `where`, with the key that its value is from."""
    node = OmegaConf.select(config, where) if where else config
    key = message.partition("=")[0]
    if key in node and OmegaConf.is_interpolation(node, key):
        plain = cast("dict[str, str]", OmegaConf.to_container(node, resolve=False))
        source = plain[key].removeprefix("${").removesuffix("}")
        return source + message.removeprefix(key)
    return f"{where}.{message}" if where else message


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
