"""Reports name the attack of the training, which cannot be changed after the training."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robusttrain.checkpoints import checkpoint as checkpoints
from robusttrain.config.folders import CONF
from robusttrain.config.schema import GROUPS
from robusttrain.errors import InputError
from robusttrain.models.mlp import MLP
from toys.external import CLASSES, SHAPE, TINY, Answer, prepared

MINE = """
from dataclasses import dataclass
from robusttrain.attacks import ThreatFields
from robusttrain.attacks.pgd import PGD
from robusttrain.defenses import Defense, Objective
from robusttrain.threat import Norm


@dataclass
class Silent(Defense):
    def outer(self, model, x, x_adv, y, *, loss):
        return Objective(loss(model(x), y).mean())


@dataclass
class WithRadius(ThreatFields, Silent):
    norm: Norm = Norm.linf
    eps: float = 0.1


@dataclass
class WithAttack(Silent):
    attack: object


def nothing(**keys):
    return None
"""
OPTIONS = {
    "defense/silent": "_target_: my_training.Silent\n",
    "defense/with_radius": "_target_: my_training.WithRadius\n",
    "defense/inline": (
        "_target_: my_training.WithAttack\n"
        "attack: {_target_: robusttrain.attacks.pgd.PGD, steps: 4}\n"
    ),
    "defense/chosen": (
        "defaults: [/attack@attack: mim, _self_]\n_target_: my_training.WithAttack\n"
    ),
}  # fmt: skip


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The override that finds the options above, and `nothing` in every group."""
    (tmp_path / "my_training.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_training", raising=False)
    nothing = {f"{group}/nothing": "_target_: my_training.nothing\n" for group in GROUPS}
    for option, text in (OPTIONS | nothing).items():
        file = tmp_path / "conf" / f"{option}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return f"hydra.searchpath=[file://{tmp_path / 'conf'}]"


def train_attack(*overrides: str) -> str:
    """The value of `train_attack` in the report of a run."""
    _, origin = prepared(*TINY, *overrides)
    return origin.names["train_attack"]


SEVERAL = "threats={linf:0.1,l2:1}"

# What a defense cannot do without.
NEEDED = {
    "avg": [SEVERAL], "distill": ["defense.teacher=/nowhere"], "eat": [SEVERAL], "ramp": [SEVERAL],
}  # fmt: skip

BY_DEFAULT = {
    "alp": "pgd-10",
    "alpha_mix": "pgd-10",
    "cc_ibp": "pgd-10",
    "crown_ibp": "none",
    "distill": "pgd_gaussian-10",
    "exp_ibp": "pgd-10",
    "avg": "pgd-10",
    "eat": "pgd-10",
    "fare": "pgd-10",
    "fgsm": "fgsm",
    "fgsm_rs": "fgsm_rs",
    "free": "built-in",
    "friendly": "friendly-10",
    "grad_align": "built-in",
    "ibp": "none",
    "lsa": "built-in",
    "madry": "pgd-10",
    "mart": "pgd_gaussian-10",
    "mtl_ibp": "pgd-10",
    "n_fgsm": "built-in",
    "ramp": "pgd-10",
    "rt": "built-in",
    "rt_perturbed": "fgsm",
    "sabr": "pgd-10",
    "standard": "none",
    "trades": "pgd_gaussian-10",
}


def test_every_defense_is_here() -> None:
    assert sorted(BY_DEFAULT) == sorted(file.stem for file in (CONF / "defense").glob("*.yaml"))


@pytest.mark.parametrize("defense", BY_DEFAULT)
def test_a_defense_names_the_attack_that_it_trains_with(defense: str) -> None:
    words = [f"defense={defense}", *NEEDED.get(defense, [])]
    assert train_attack(*words) == BY_DEFAULT[defense]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["defense=madry", "attack=fgsm_rs"], "fgsm_rs"),
        (["defense=fgsm_rs", "attack=pgd"], "pgd-10"),
        (["attack.steps=3"], "pgd-3"),
        (["attack=max", "attack.attack.steps=5", SEVERAL], "max-5"),
        (["attack=msd", SEVERAL], "msd-20"),
        (["attack=apgd_ce", "attack.steps=7"], "apgd_ce-7"),
        (["training.curriculum.steps=[2,5]"], "pgd-2/5"),
        (["defense=alp", "defense.pairing=clean"], "none"),
        # It has no attack, whatever the run has.
        (["defense=standard", "attack=fgsm"], "none"),
        (["defense=n_fgsm", "attack=pgd"], "built-in"),
    ],
)
def test_the_attack_has_the_settings_of_the_command_line(
    overrides: list[str], expected: str
) -> None:
    assert train_attack(*overrides) == expected


@pytest.mark.parametrize(
    ("defense", "expected"),
    [("silent", ""), ("with_radius", "built-in"), ("inline", "PGD-4"), ("chosen", "mim-10")],
)
def test_a_defense_of_the_users_own_names_its_attack(
    mine: str, defense: str, expected: str
) -> None:
    assert train_attack(mine, f"defense={defense}") == expected


def test_an_attack_with_another_inside_has_the_steps_of_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robusttrain.load_model", lambda run, trust: nn.Identity())
    source = ["attack=transfer", f"attack.source.run={tmp_path}"]
    assert train_attack(*source) == "transfer-50"
    with pytest.raises(InputError, match=r"^attack=none is not allowed"):
        train_attack(*source, "attack@attack.attack=none")


# --- a model that is evaluated ------------------------------------------------------------------

TRAINED = [
    *TINY, "model=mlp", "model.widths=[4]", "defense=madry", "attack=fgsm_rs", "averaging=ema",
    "weight_perturbation=awp", "optimizer.lr=0.01",
]  # fmt: skip
BRIEFLY = ["evaluation=quick", "evaluation.audit=false", "device=cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    folder = tmp_path_factory.mktemp("trained") / "run"
    answer = Answer(folder, *TRAINED, "evaluation.audit=false")
    return folder, answer


def described(answer: Answer) -> tuple[str, str]:
    (row,) = answer.report[["defense", "train_attack"]].drop_duplicates().itertuples(index=False)
    return str(row.defense), str(row.train_attack)


def test_the_report_names_it_and_so_does_an_evaluation(
    trained: tuple[Path, Answer], tmp_path: Path
) -> None:
    folder, first = trained
    assert described(first) == ("madry+awp+ema", "fgsm_rs")
    again = Answer(tmp_path / "run", f"checkpoint={folder}", "stages=[evaluate]", *BRIEFLY)
    assert described(again) == described(first)


@pytest.mark.parametrize(
    ("override", "theirs"),
    [
        ("defense=trades", "defense=madry"),
        ("defense=standard", "defense=madry"),
        ("attack=pgd", "attack=fgsm_rs"),
        ("averaging=none", "averaging=ema"),
        ("weight_perturbation=none", "weight_perturbation=awp"),
        ("optimizer=sgd", "optimizer=adam"),
        ("optimizer.lr=0.1", "optimizer.lr=0.01"),
        ("schedule=step", "schedule=one_cycle"),
        ("epochs=7", "epochs=1"),
        ("batch_size=7", "batch_size=32"),
        ("training.label_smoothing=0.1", "training.label_smoothing=0.0"),
        ("training.curriculum.steps=[3]", "training.curriculum.steps=[]"),
        ("attack.step_size=2/255", "attack.step_size=None"),
    ],
)
def test_an_evaluation_cannot_change_the_training(
    trained: tuple[Path, Answer], override: str, theirs: str
) -> None:
    words = [f"checkpoint={trained[0]}", "stages=[evaluate]", *BRIEFLY, override]
    with pytest.raises(InputError) as caught:
        prepared(*words)
    assert str(caught.value) == (
        f"{override} differs from the training of the checkpoint: it had {theirs}"
    )


def test_arguments_of_the_training_may_be_repeated(trained: tuple[Path, Answer]) -> None:
    config, origin = prepared(*TRAINED, f"checkpoint={trained[0]}", "stages=[evaluate]")
    assert origin.names["train_attack"] == "fgsm_rs"
    assert origin.names["defense"] == "madry"
    assert config.defense.attack == config.attack


def test_keys_of_the_evaluation_may_be_set(trained: tuple[Path, Answer]) -> None:
    words = [
        f"checkpoint={trained[0]}", "stages=[evaluate]", *BRIEFLY, "eps=0.3", "norm=l2", "seed=4",
        "+attack@evaluation.attacks.strong=pgd", "evaluation.attacks.strong.steps=100",
    ]  # fmt: skip
    config, origin = prepared(*words)
    assert (config.eps, config.norm, config.seed) == (0.3, "l2", 4)
    assert config.evaluation.attacks["strong"].steps == 100
    assert origin.names["train_attack"] == "fgsm_rs"


def test_a_further_training_has_its_own_attack(trained: tuple[Path, Answer]) -> None:
    further = [f"checkpoint={trained[0]}", "stages=[train]"]
    assert prepared(*further)[1].names["train_attack"] == "fgsm_rs"
    assert prepared(*further, "defense=trades")[1].names["train_attack"] == "pgd_gaussian-10"
    assert prepared(*further, "attack=pgd", "attack.steps=4")[1].names["train_attack"] == "pgd-4"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["defense=madry"], "pgd-10"),
        (["defense=trades", "attack.steps=4"], "pgd_gaussian-4"),
        (["training.curriculum.steps=[1,2]"], "pgd-1/2"),
        (["defense=n_fgsm"], "built-in"),
        (["defense=standard"], "none"),
    ],
)
def test_it_is_derived_from_a_checkpoint_without_the_name(
    tmp_path: Path, overrides: list[str], expected: str
) -> None:
    """Checkpoints of earlier versions only have the configuration."""
    _, origin = prepared(*TINY, *overrides)
    names = {key: name for key, name in origin.names.items() if key != "train_attack"}
    about: dict[str, Any] = {"config": copy.deepcopy(origin.config), "names": names}
    checkpoints.Checkpoint({}, CLASSES, list(SHAPE), epoch=1, training={}, **about).save(
        tmp_path / "best.pt"
    )
    _, again = prepared(f"checkpoint={tmp_path}", "stages=[evaluate]", *BRIEFLY)
    assert again.names["train_attack"] == expected


def test_it_is_unknown_for_a_model_from_elsewhere(tmp_path: Path) -> None:
    torch.save(MLP([4]).build(CLASSES, SHAPE).state_dict(), tmp_path / "theirs.pt")
    words = [*TINY, "model=mlp", "model.widths=[4]", f"checkpoint={tmp_path / 'theirs.pt'}"]
    answer = Answer(tmp_path / "run", *words, "stages=[evaluate]", "evaluation.audit=false")
    assert described(answer) == ("foreign", "")
    # The defense is given here, but not its attack.
    told = prepared(*words, "stages=[evaluate]", "defense=madry")[1].names
    assert (told["defense"], told["train_attack"]) == ("madry", "")
    assert prepared(*words, "defense=madry")[1].names["train_attack"] == "pgd-10"


# --- factories that return None -------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_a_factory_that_returns_nothing_is_refused_by_its_key(mine: str, group: str) -> None:
    with pytest.raises(InputError) as caught:
        prepared(mine, f"{group}=nothing")
    assert str(caught.value) == f"{group} builds no component: my_training.nothing returned None"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("+attack@evaluation.attacks.own=nothing", "evaluation.attacks.own"),
        ("attack@evaluation.attacks.pgd=nothing", "evaluation.attacks.pgd"),
        ("attack@training.validation_attack=nothing", "training.validation_attack"),
        ("noise=stack +noise@noise.mechanisms.one=nothing", "noise.mechanisms.one"),
    ],
)
def test_so_is_one_inside_another_component(mine: str, override: str, key: str) -> None:
    with pytest.raises(InputError, match=rf"^{key} builds no component"):
        prepared(mine, *TINY, *override.split())
