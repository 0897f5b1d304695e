"""The configuration: every option composes and builds, and errors name the full key."""

import copy
import dataclasses
import importlib
import re
import sys
from collections.abc import Iterator
from enum import StrEnum
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import hydra
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

import robusttrain
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.friendly import FriendlyPGD
from robusttrain.attacks.none import NoAttack
from robusttrain.attacks.pgd import Start
from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.config import build as configs
from robusttrain.config import schema as schemas
from robusttrain.config.folders import CONF
from robusttrain.config.run_config import Config
from robusttrain.config.several_threats import with_own_threat
from robusttrain.errors import InputError
from robusttrain.models import build_model
from robusttrain.runs.inherit import INHERITED, inherit_config, with_saved_config
from robusttrain.runs.results import combined
from robusttrain.threat import Norm
from toys.attacks import EXTERNAL, is_missing

pytestmark = pytest.mark.long

# Hydra's own settings are not components.
FOLDERS = sorted(folder for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra")
OPTIONS = [(folder.name, file.stem) for folder in FOLDERS for file in sorted(folder.glob("*.yaml"))]
ATTACKS = [option for group, option in OPTIONS if group == "attack"]
DEFENSES = [option for group, option in OPTIONS if group == "defense"]
EVALUATIONS = [option for group, option in OPTIONS if group == "evaluation"]

SEVERAL = "threats={linf:0.1,l2:1}"

# Values that an option cannot do without.
NEEDED = {
    ("attack", "max"): [SEVERAL],
    ("attack", "msd"): [SEVERAL],
    ("defense", "avg"): [SEVERAL],
    ("defense", "eat"): [SEVERAL],
    ("defense", "ramp"): [SEVERAL],
    ("dataset", "folder"): ["dataset.path=/nowhere"],
    ("dataset", "huggingface"): ["dataset.path=/nowhere"],
    ("dataset", "arrays"): ["dataset.train=/nowhere.npz"],
    ("attack", "carlini_wagner"): ["norm=l2"],
    ("attack", "ddn"): ["norm=l2"],
    **{
        ("attack", option): ["norm=l2", f"attack.name={name}"]
        for option, (_, name) in EXTERNAL.items()
    },
    ("attack", "none"): ["defense=ibp"],
    ("attack", "transfer"): ["attack.source.run=/nowhere"],
    ("defense", "distill"): ["defense.teacher=/nowhere"],
    ("noise", "stack"): ["+noise@noise.mechanisms.one=rse"],
}

# Attacks that do not climb the loss that a defense gives them.
OWN_OBJECTIVES = {
    "apgd_dlr", "apgd_margin", "apgd_t", "carlini_wagner", "deepfool", "fab", "fab_t", "fmn",
    "multi_targeted", "softmax_linearisation", "square", *EXTERNAL,
}  # fmt: skip

# Defenses of several norms, and attacks that are for one norm only or for several by themselves.
OF_SEVERAL = {"avg", "eat", "ramp"}
UNFIT_FOR_SEVERAL = {"carlini_wagner", "ddn", "max", "msd", *EXTERNAL}

# Attacks that defenses refuse: those that start where a divergence has gradient 0, those that do
# not climb it, and those that would turn a defense into another method.
ATTACKLESS = {"standard", "free", "grad_align", "lsa", "n_fgsm", "rt", "ibp", "crown_ibp"}
REFUSED = {
    ("trades", "fgsm"), ("trades", "mim"), ("trades", "ddn"), ("trades", "msd"),
    *((defense, attack) for defense in OF_SEVERAL for attack in UNFIT_FOR_SEVERAL),
    *((defense, "none") for defense in DEFENSES if defense not in ATTACKLESS),
    *((d, attack) for d in ("ibp", "crown_ibp") for attack in ATTACKS if attack != "none"),
    *((defense, attack) for defense in ("distill", "fare", "trades") for attack in OWN_OBJECTIVES),
    *(("fare", attack) for attack in ("ddn", "fgsm", "friendly", "mim", "msd", "transfer")),
    ("fare", "pgd20"), ("fare", "pgd50_10"),
}  # fmt: skip

# The model of the run that a transfer attack loads here.
SOURCE = torch.nn.Identity()


@pytest.fixture(scope="module", autouse=True)
def conf() -> Iterator[None]:
    schemas.register()
    with (
        hydra.initialize_config_dir(str(CONF), version_base="1.3"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(robusttrain, "load_model", lambda run, trust: SOURCE)
        yield


@cache
def _composed(*overrides: str) -> DictConfig:
    return hydra.compose("config", list(overrides))


def raw(*overrides: str) -> DictConfig:
    """A copy of the configuration that Hydra composes, which takes it a fifth of a second."""
    return copy.deepcopy(_composed(*overrides))


def composed(*overrides: str) -> DictConfig:
    return configs.with_numbers(raw(*overrides))


def built(*overrides: str) -> Config:
    return configs.build(composed(*overrides))


def chosen(group: str, option: str) -> DictConfig:
    """The configuration with one option, and with the evaluation that composes fastest."""
    rest = [] if group in ("evaluation", "experiment") else ["evaluation=quick"]
    return composed(f"{group}={option}", *rest, *NEEDED.get((group, option), []))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_builds(group: str, option: str) -> None:
    if group == "attack" and is_missing(option):
        pytest.skip(f"the library {EXTERNAL[option][0]} is not installed")
    config = configs.build(chosen(group, option))
    if group != "experiment":
        component = getattr(config, group)
        assert type(component).__module__.startswith(schemas.GROUPS[group].place)


def test_every_group_of_components_has_its_folder() -> None:
    assert {folder.name for folder in FOLDERS} == {*schemas.GROUPS, "experiment"}


# Composed once for all defenses, which do not change them.
attack_node = cache(lambda attack: chosen("attack", attack).attack)


@pytest.mark.parametrize("defense", DEFENSES)
def test_a_defense_takes_every_attack(defense: str) -> None:
    # The one norm that every attack knows.
    needed = [*{SEVERAL, *NEEDED.get(("defense", defense), [])}]
    whole = composed(f"defense={defense}", "norm=l2", "evaluation=quick", *needed)
    # A whole configuration takes several times as long to build.
    node = OmegaConf.masked_copy(whole, ["defense", "attack", "norm", "eps", "threats", "trust"])
    for attack in (option for option in ATTACKS if not is_missing(option)):
        node.attack = attack_node(attack)
        if (defense, attack) in REFUSED:
            with pytest.raises(
                InputError,
                match=r"^(defense\.attack\.(random_start=False|norm=\w+)|attack=\w+) is not",
            ):
                configs.build_component(node)
            continue
        parts = configs.build_component(node)
        used = getattr(parts["defense"], "attack", None)
        assert used is None or used == parts["attack"]


def test_defenses_that_are_named_after_an_attack_train_with_it() -> None:
    assert type(built("defense=fgsm").defense.attack).__name__ == "FGSM"
    assert type(built("defense=madry").defense.attack).__name__ == "PGD"
    config = built("attack=lbfgs", "defense=fgsm")
    assert type(config.defense.attack).__name__ == "LBFGS"


# The settings of the papers, which are the defaults of these options.
PUBLISHED = {
    "defense=trades": {"defense.beta": 6.0, "attack.start": Start.gaussian},
    "defense=mart": {"defense.beta": 6.0, "attack.start": Start.gaussian},
    "defense=distill": {"defense.alpha": 5 / 6, "attack.start": Start.gaussian},
    "defense=friendly": {"attack": FriendlyPGD(Norm.linf, 0.1), "attack.tau": 0},
    "defense=fgsm_rs": {"attack": FGSM(Norm.linf, 0.1, random_start=True)},
    "defense=n_fgsm": {"defense.k": 2.0},
    "defense=grad_align": {"defense.weight": 0.2},
    "defense=ibp": {"defense.attack": NoAttack(), "defense.eps": 0.1, "defense.weight": 0.5},
    "defense=free": {"defense.replays": 8},
    "weight_perturbation=awp": {"weight_perturbation.gamma": 0.01},
    "averaging=ema": {"averaging.decay": 0.995},
}


@pytest.mark.parametrize("override", PUBLISHED)
def test_a_method_has_the_settings_of_its_paper(override: str) -> None:
    needed = NEEDED.get(tuple(override.split("=")), [])  # type: ignore[call-overload]
    config = built(override, "eps=0.1", "evaluation=quick", *needed)
    for key, value in PUBLISHED[override].items():
        assert attrgetter(key)(config) == value


COMPONENTS = [component for group in schemas.GROUPS for component in schemas.components(group)]


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.__name__)
def test_a_schema_has_the_fields_and_defaults_of_its_class(component: type) -> None:
    schema = {field.name: field for field in dataclasses.fields(schemas.schema(component))}
    target = schema.pop("_target_").default
    module, _, name = target.rpartition(".")
    assert getattr(importlib.import_module(module), name) is component
    fields = [field for field in dataclasses.fields(component) if field.init and not field.metadata]
    own = {field.name: field for field in fields}
    assert schema.keys() == own.keys()
    for key, field in own.items():
        if field.default is not dataclasses.MISSING:
            assert schema[key].default == field.default
        elif field.default_factory is dataclasses.MISSING:
            assert schema[key].default == "???"


def test_every_component_has_an_option() -> None:
    """A class that no YAML names cannot be chosen from the command line."""
    texts = [(CONF / group / f"{option}.yaml").read_text() for group, option in OPTIONS]
    named = set(re.findall(r"/schema/\w+/(\w+)@", "".join(texts)))
    assert {component.__name__ for component in COMPONENTS} == named


# --- fractions ---------------------------------------------------------------------------------


def radii(part: Any) -> Iterator[float]:
    """Every eps in a component and in its parts."""
    held = vars(part) if dataclasses.is_dataclass(part) else part
    if isinstance(held, dict):
        for key, value in held.items():
            if key == "eps":
                yield value
            yield from radii(value)


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_one_eps_reaches_every_part(evaluation: str) -> None:
    config = built("eps=8/255", "defense=rt", "attack=fgsm", f"evaluation={evaluation}")
    found = list(radii(config))
    assert found == [8 / 255] * len(found)
    # Those of the run, attack, defense, validation attack, and of all attacks of the evaluation.
    probes = [] if config.evaluation.probe is None else [config.evaluation.probe]
    searches = [] if config.evaluation.radii is None else config.evaluation.radii.attacks
    assert len(found) == 4 + len(probes) + len(config.evaluation.attacks) + len(searches)


def test_a_fraction_works_wherever_pixels_are_meant() -> None:
    keys = [
        "eps", "attack.eps", "attack.step_size", "defense.eps", "noise.sigma",
        "evaluation.attacks.pgd.eps", "evaluation.attacks.pgd.step_size", "evaluation.probe.eps",
        "training.validation_attack.eps",
    ]  # fmt: skip
    fractions = [f"{key}={number}/255" for number, key in enumerate(keys, 1)]
    config = built("defense=lsa", "noise=gaussian", "evaluation=quick", *fractions)
    for number, key in enumerate(keys, 1):
        value: Any = config
        for part in key.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        assert value == number / 255, key


def test_a_fraction_works_in_a_yaml_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "attack").mkdir()
    (tmp_path / "attack" / "mine.yaml").write_text(
        "defaults: [/schema/attack/PGD@_here_, _self_]\neps: 2/255\nstep_size: 1/255\n"
    )
    attack = built(f"hydra.searchpath=[file://{tmp_path}]", "attack=mine").attack
    assert (attack.eps, attack.step_size) == (2 / 255, 1 / 255)


@pytest.mark.parametrize("value", ["abc", "8/0", "", "1/2/3", True, [1]])
def test_a_value_that_is_not_a_number_is_refused_by_its_full_key(value: object) -> None:
    config = raw()
    config.attack.eps = value
    with pytest.raises(InputError, match=r"^attack\.eps=.* must be a number or a fraction"):
        configs.with_numbers(config)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["attack.stps", "defense.alhpa", "training.curriculum.foo", "evaluation.attacks.square.foo"],
)
def test_an_unknown_key_is_refused_by_its_full_name(key: str) -> None:
    with pytest.raises(ConfigCompositionException, match=re.escape(key)):
        composed(f"{key}=3")


CHOICES = [kind for kind in StrEnum.__subclasses__() if kind.__module__.startswith("robusttrain.")]


@pytest.mark.parametrize("choice", [member for kind in CHOICES for member in kind], ids=repr)
def test_a_choice_is_a_word_on_the_command_line(choice: StrEnum) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"key={choice}"])
    assert override.value() == str(choice)


@pytest.mark.parametrize(
    "override",
    ["attack.steps=2.5", "seed=abc", "norm=l3", "stages=[walk]", "model.width=wide"],
)
def test_a_wrong_type_is_refused_by_its_full_name(override: str) -> None:
    with pytest.raises(ConfigCompositionException, match=re.escape(override)):
        composed(override)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("evaluation.attacks.square.queries=0", "evaluation.attacks.square.queries=0"),
        ("evaluation.probe.steps=0", "evaluation.probe.steps=0"),
        ("training.validation_attack.restarts=0", "training.validation_attack.restarts=0"),
        ("attack.eps=-1", "attack.eps=-1"),
        # The key that was typed, not that of the first component that refers to it.
        ("eps=-1", "eps=-1"),
        ("epochs=-1", "epochs=-1"),
        ("seed=-1", "seed=-1"),
    ],
)
def test_a_value_out_of_range_is_refused_by_the_key_that_holds_it(
    override: str, named: str
) -> None:
    with pytest.raises(InputError) as caught:
        built(override)
    assert str(caught.value).startswith(f"{named} is not allowed: it must be")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("dataset=folder", "dataset.path"),
        ("attack=transfer", "attack.source.run"),
        ("+attack@evaluation.attacks.other=transfer", "evaluation.attacks.other.source.run"),
    ],
)
def test_a_missing_mandatory_value_is_named(override: str, key: str) -> None:
    with pytest.raises(MissingMandatoryValue) as caught:
        built(override)
    assert caught.value.full_key == key


# --- evaluation attacks ------------------------------------------------------------------------


def test_an_evaluation_attack_is_added_with_settings_of_its_own() -> None:
    strong = ["+attack@evaluation.attacks.strong=pgd", "evaluation.attacks.strong.steps=100"]
    attacks = built("evaluation=quick", *strong).evaluation.attacks
    assert list(attacks) == ["uniform", "fgsm", "pgd", "apgd_ce", "strong"]
    assert attacks["strong"].steps == 100
    assert attacks["pgd"].steps == 20


def test_an_evaluation_attack_is_replaced() -> None:
    replaced = "attack@evaluation.attacks.pgd=pgd50_10"
    attacks = built("evaluation=quick", replaced).evaluation.attacks
    assert attacks["pgd"].restarts == 10


@pytest.mark.parametrize(
    "override", ["~evaluation.attacks.fgsm", "~attack@evaluation.attacks.fgsm"]
)
def test_an_evaluation_attack_is_removed(override: str) -> None:
    attacks = built("evaluation=quick", override).evaluation.attacks
    assert list(attacks) == ["uniform", "pgd", "apgd_ce"]


# --- a configuration that comes with a checkpoint ----------------------------------------------


def saved(*overrides: str) -> Checkpoint:
    config = OmegaConf.to_container(composed(*overrides), resolve=False, enum_to_str=True)
    assert isinstance(config, dict)
    return Checkpoint({}, 10, [1, 8, 8], config, {}, 1, {})


def continued(checkpoint: Checkpoint, *overrides: str) -> Config:
    """The run that these overrides describe when `checkpoint` is given with them."""
    config = raw(*overrides)
    OmegaConf.set_struct(config, False)
    before = copy.deepcopy(config)
    composed, _ = with_saved_config(config, checkpoint, overrides)
    assert config == before
    return configs.build(configs.with_numbers(composed))


def test_keys_that_are_not_set_come_from_the_saved_run() -> None:
    checkpoint = saved(
        "dataset=synthetic", "dataset.train_size=77", "model=mlp", "model.widths=[3]",
        "noise=gaussian", "noise.sigma=4/255", "defense=fgsm", "eps=8/255", "norm=l2", "seed=5",
        "epochs=3",
    )  # fmt: skip
    config = continued(checkpoint, "evaluation=quick")
    before = configs.build(OmegaConf.create(checkpoint.config))
    for key in INHERITED:
        assert getattr(config, key) == getattr(before, key), key
    assert config.evaluation.attacks["pgd"].eps == 8 / 255
    # The length of the training belongs to the new run.
    assert config.epochs == built("evaluation=quick").epochs != 3


@pytest.mark.parametrize("override", ["eps=0.5", "seed=9", "norm=l1", "dataset=digits"])
def test_the_command_line_wins_over_a_saved_run(override: str) -> None:
    config = continued(saved("eps=0.2", "norm=l2", "dataset=synthetic", "seed=1"), override)
    fresh = built(override)
    key = override.partition("=")[0]
    assert getattr(config, key) == getattr(fresh, key)
    others = {"eps": 0.2, "norm": "l2", "seed": 1}
    assert all(getattr(config, k) == value for k, value in others.items() if k != key)


def test_a_key_inside_a_component_is_set_on_the_saved_one() -> None:
    checkpoint = saved("defense=fgsm", "model=mlp", "model.widths=[3]", "dataset=synthetic")
    config = continued(checkpoint, "dataset.validation=7", "attack.eps=0.7")
    assert type(config.dataset).__name__ == "Synthetic"
    assert config.dataset.validation == 7
    assert type(config.defense.attack).__name__ == "FGSM"
    assert config.defense.attack.eps == 0.7


def test_an_attack_for_the_evaluation_does_not_choose_the_training_attack() -> None:
    config = continued(saved("defense=fgsm"), "+attack@evaluation.attacks.strong=pgd")
    assert type(config.defense.attack).__name__ == "FGSM"
    assert type(config.evaluation.attacks["strong"]).__name__ == "PGD"


@pytest.mark.parametrize(
    ("before", "words", "after"),
    [
        ([SEVERAL, "norm=l2"], [], {"norm": "l2", "eps": 1, "threats": {"linf": 0.1, "l2": 1}}),
        ([SEVERAL], ["eps=0.3"], {"norm": "linf", "eps": 0.3, "threats": {}}),
        ([SEVERAL], ["norm=l1"], {"norm": "l1", "eps": 0.1, "threats": {}}),
        (
            ["norm=l2", "eps=0.7"],
            [SEVERAL],
            {"norm": "l2", "eps": 1, "threats": {"linf": 0.1, "l2": 1}},
        ),
        (
            ["norm=l1", "eps=0.7"],
            [SEVERAL],
            {"norm": "linf", "eps": 0.1, "threats": {"linf": 0.1, "l2": 1}},
        ),
    ],
)
def test_one_threat_model_of_the_command_line_replaces_several_saved_ones_and_conversely(
    before: list[str], words: list[str], after: dict[str, Any]
) -> None:
    checkpoint = Checkpoint({}, 10, [1, 8, 8], _settled(raw(*before), before), {}, 1, {})
    config = raw(*words)
    OmegaConf.set_struct(config, False)
    found, _ = with_saved_config(config, checkpoint, words)
    assert {key: _settled(found, words)[key] for key in after} == after


def _settled(config: DictConfig, words: list[str]) -> dict[str, Any]:
    settled = with_own_threat(configs.with_numbers(config), words)
    return cast("dict[str, Any]", OmegaConf.to_container(settled, enum_to_str=True))


def test_the_suite_searches_each_of_several_threat_models() -> None:
    words = ["threats={linf:8/255,l2:1}", "evaluation=quick", "+attack@evaluation.attacks.own=pgd"]
    config = with_own_threat(composed(*words, "evaluation.attacks.own.eps=0.5"), words)
    suite = configs.build(config).evaluation.attacks
    assert list(suite) == [
        "uniform_linf", "fgsm_linf", "pgd_linf", "apgd_ce_linf",
        "uniform_l2", "fgsm_l2", "pgd_l2", "apgd_ce_l2", "own",
    ]  # fmt: skip
    assert (suite["pgd_linf"].eps, suite["pgd_l2"].eps, suite["own"].eps) == (8 / 255, 1, 0.5)


def test_a_saved_defense_keeps_its_attack_and_a_new_one_brings_its_own() -> None:
    checkpoint = saved("defense=fgsm")
    assert type(continued(checkpoint).defense.attack).__name__ == "FGSM"
    new = continued(checkpoint, "defense=madry")
    assert type(new.defense.attack).__name__ == "PGD"


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.Popen",
        "torch.load",
        # Reachable through modules of the package, yet none of its classes.
        "robusttrain.runs.manifest.subprocess.Popen",
        "robusttrain.config.build.instantiate",
        "robusttrain.config.schema.importlib.import_module",
        "robusttrain_evil.Attack",
    ],
)
@pytest.mark.parametrize("key", ["model", "defense", "attack"])
def test_a_saved_run_builds_no_untrusted_class(key: str, target: str) -> None:
    checkpoint = saved()
    checkpoint.config[key] = {"_target_": target}
    with pytest.raises(InputError, match=rf"would build {re.escape(target)}.*trust="):
        continued(checkpoint)


def test_an_untrusted_class_deep_in_a_saved_run_is_found() -> None:
    checkpoint = saved()
    checkpoint.config["defense"]["attack"] = {"list": [{"_target_": "os.system"}]}
    with pytest.raises(InputError, match=r"os\.system"):
        continued(checkpoint)


@pytest.mark.parametrize("where", ["defense.attack", "training.curriculum.steps"])
def test_so_is_one_in_a_saved_run_that_is_evaluated(where: str, tmp_path: Path) -> None:
    checkpoint = saved()
    hidden = OmegaConf.create(checkpoint.config)
    OmegaConf.update(hidden, where, [{"_target_": "os.system"}], merge=False)
    plain: Any = OmegaConf.to_container(hidden, resolve=False)
    dataclasses.replace(checkpoint, config=plain).save(tmp_path / "best.pt")
    with pytest.raises(InputError, match=r"would build os\.system"):
        inherit_config(raw(f"checkpoint={tmp_path}", "stages=[evaluate]"), [])


# --- components of the user's own --------------------------------------------------------------

MINE = """
from dataclasses import dataclass
import torch
from torch import nn
from robusttrain.data import Info, Split
from robusttrain.defenses import Objective


@dataclass
class Attack:
    eps: float

    def __call__(self, model, x, y, *, loss=None, generator=None):
        return x


@dataclass
class Defense:
    attack: object
    weight: float = 1.0

    def inner(self, model, x, y, *, generator):
        return self.attack(model, x, y)

    def outer(self, model, x, x_adv, y, *, loss):
        return Objective(self.weight * loss(model(x_adv), y).mean())


@dataclass
class Model:
    def build(self, num_classes, image_shape):
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


@dataclass
class Noise:
    sigma: float = 0.0

    def install(self, model, seed):
        model.sigma = self.sigma


@dataclass
class Dataset:
    validation: float = 2
    crop: int = 0
    flip: bool = False

    def info(self):
        return Info((1, 4, 4), 2, ("a", "b"))

    def load(self):
        split = Split(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8) % 2)
        return split, split
"""
MY_OPTIONS = {
    "attack": "_target_: my_components.Attack\neps: ${eps}\n",
    "defense": "_target_: my_components.Defense\nattack: ${attack}\nweight: 0.5\n",
    "model": "_target_: my_components.Model\n",
    "noise": "_target_: my_components.Noise\nsigma: 1/255\n",
    "dataset": "_target_: my_components.Dataset\n",
}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The override that finds one option `mine` for each of five groups."""
    (tmp_path / "my_components.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_components", raising=False)
    for group, text in MY_OPTIONS.items():
        file = tmp_path / "conf" / group / "mine.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    return f"hydra.searchpath=[file://{tmp_path / 'conf'}]"


@pytest.mark.parametrize("group", MY_OPTIONS)
def test_a_class_of_the_users_own_takes_any_place(mine: str, group: str) -> None:
    component = getattr(built(mine, f"{group}=mine"), group)
    assert type(component).__module__ == "my_components"


def test_all_components_may_be_the_users_own(mine: str) -> None:
    config = built(mine, "eps=8/255", *[f"{group}=mine" for group in MY_OPTIONS])
    assert config.defense.weight == 0.5
    assert config.defense.attack.eps == 8 / 255
    assert config.noise.sigma == 1 / 255
    info = config.dataset.info()
    model = build_model(config.model, info.num_classes, info.image_shape)
    assert model(torch.rand(3, 1, 4, 4)).shape == (3, 2)


def test_a_saved_run_with_components_of_the_users_own_needs_trust(mine: str) -> None:
    checkpoint = saved(mine, "defense=mine")
    with pytest.raises(InputError, match=r"my_components\.Defense.*trust=\[\.\.\.\]"):
        continued(checkpoint)
    config = continued(checkpoint, "trust=[my_components]")
    assert config.defense.weight == 0.5


def test_an_option_that_names_no_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "attack").mkdir()
    (tmp_path / "attack" / "mine.yaml").write_text("eps: 0.1\n")
    with pytest.raises(InputError, match=r"^attack names no class.*_target_"):
        built(f"hydra.searchpath=[file://{tmp_path}]", "attack=mine")


def test_the_help_names_every_option_and_every_top_level_key() -> None:
    """The help is written by hand; an option that it does not name stays unknown to its users."""
    text = (CONF / "hydra" / "help" / "robusttrain.yaml").read_text()
    words = set(re.findall(r"\w+", text))
    options = {path.stem for path in CONF.glob("*/*.yaml")}
    keys = {field.name for field in dataclasses.fields(Config) if not field.metadata}
    assert options | keys <= words


def test_the_help_fits_on_a_screen() -> None:
    help_file = OmegaConf.load(CONF / "hydra" / "help" / "robusttrain.yaml")
    lines = help_file.template.splitlines()
    assert len(lines) <= 52
    assert max(len(line) for line in lines) <= 80


def test_the_length_of_a_training_comes_with_its_data_set(tmp_path: Path) -> None:
    config = raw("dataset=synthetic", "epochs=7", "batch_size=9")
    plain: Any = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    Checkpoint({}, 3, [1, 8, 8], plain, {"defense": "madry"}, 1, {}).save(tmp_path / "best.pt")

    def length(*words: str) -> tuple[int, int]:
        found = inherit_config(raw(f"checkpoint={tmp_path}", *words), words).config
        return found.epochs, found.batch_size

    fresh = raw()
    assert length() == (7, 9)
    assert length("epochs=3") == (3, 9)
    assert length("dataset=digits") == (fresh.epochs, fresh.batch_size)


@pytest.mark.parametrize(("stages", "found"), [("evaluate", "awp"), ("train", None)])
def test_a_training_extends_its_defense_by_its_own_command_line(
    stages: str, found: str | None, tmp_path: Path
) -> None:
    names = {"defense": "trades", "weight_perturbation": "awp", "averaging": "none"}
    plain: Any = OmegaConf.to_container(raw(), resolve=False, enum_to_str=True)
    Checkpoint({}, 3, [1, 8, 8], plain, names, 1, {}).save(tmp_path / "best.pt")
    _, reported, _ = inherit_config(raw(f"checkpoint={tmp_path}", f"stages=[{stages}]"), [])
    assert reported["defense"] == "trades"
    assert reported.get("weight_perturbation") == found


def test_a_report_names_what_a_defense_is_combined_with() -> None:
    names = {"defense": "trades", "weight_perturbation": "awp", "averaging": "ema"}
    assert combined(names) == "trades+awp+ema"
    assert combined({**names, "weight_perturbation": "none"}) == "trades+ema"
    assert combined({"defense": "madry"}) == "madry"
