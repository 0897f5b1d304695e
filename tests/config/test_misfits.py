"""Values and objects of another kind than the type hints of a component ask for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import nn

from robusttrain.attacks import Attack
from robusttrain.attacks.pgd import PGD
from robusttrain.config.misfits import refuse_objects, refuse_values
from robusttrain.config.run_config import Config
from robusttrain.defenses import Defense
from robusttrain.errors import InputError


@dataclass
class Takes:
    """A component with a field of each kind."""

    attack: Attack
    many: Mapping[str, Attack] = field(default_factory=dict)
    perhaps: Attack | None = None
    forgotten: Attack = None  # type: ignore[assignment]
    source: nn.Module | str = ""
    count: int = 1
    share: float = 1.0
    free: Any = None


HERE = f"{__name__}.Takes"
PGD_NODE = {"_target_": "robusttrain.attacks.pgd.PGD"}


@pytest.mark.parametrize(
    "values",
    [
        {"attack": PGD_NODE},
        {"attack": "???"},
        {"many": {"a": PGD_NODE}},
        {"many": {}},
        {"perhaps": None},
        {"forgotten": None},
        {"source": "run"},
        {"source": {"_target_": "torch.nn.Identity"}},
        {"share": 1},
        {"free": [1, "a", None]},
        {"unknown": 5},
    ],
)
def test_values_that_fit_are_taken(values: dict[str, Any]) -> None:
    refuse_values({"part": {"_target_": HERE, **values}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attack": 5}, r"part\.attack=5 .*robusttrain\.attacks\.Attack"),
        ({"attack": None}, r"part\.attack=null"),
        ({"many": {"a": None}}, r"part\.many\.a=null"),
        ({"many": 5}, r"part\.many=5"),
        ({"perhaps": "abc"}, r"part\.perhaps=abc .* or null"),
        ({"source": None}, r"part\.source=null .*torch\.nn\.Module or text"),
        ({"count": 0.5}, r"part\.count=0\.5 .* a whole number"),
        ({"count": None}, r"part\.count=null"),
        ({"share": "abc"}, r"part\.share=abc .* a number"),
    ],
)
def test_other_values_are_refused_by_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        refuse_values({"part": {"_target_": HERE, **values}})


def test_a_class_that_cannot_be_found_is_left_to_the_one_who_builds_it() -> None:
    refuse_values({"_target_": "nosuch.Class", "attack": 5})


def test_objects_are_judged_by_their_members() -> None:
    node = {"attack": {"_target_": "builder"}, "many": {"a": {"_target_": "other"}}}
    refuse_objects(node, Takes(PGD(), {"a": PGD()}))
    with pytest.raises(InputError, match=r"^attack\._target_=builder .* int.*no __call__"):
        refuse_objects(node, Takes(5, {"a": PGD()}))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^many\.a\._target_=other .* str"):
        refuse_objects(node, Takes(PGD(), {"a": "b"}))  # type: ignore[dict-item]
    with pytest.raises(InputError, match=r"^attack builds no component: builder returned None"):
        refuse_objects(node, Takes(None, {"a": PGD()}))  # type: ignore[arg-type]


def test_every_group_of_a_run_names_the_component_that_it_takes() -> None:
    """An object without any member fits no group."""
    groups = [name for name in Config.__dataclass_fields__ if name not in PLAIN]
    for name in groups:
        empty = object.__new__(Config)
        setattr(empty, name, object())
        with pytest.raises(InputError, match=rf"^{name}\._target_=some\.class builds"):
            refuse_objects({name: {"_target_": "some.class"}}, empty)
    assert Defense.__name__.lower() in groups


PLAIN = {
    "norm", "eps", "seed", "epochs", "batch_size", "device", "stages", "checkpoint", "resume",
    "deterministic", "keep_memory", "data_dir", "download", "verbosity", "report",
    "trust",
}  # fmt: skip
