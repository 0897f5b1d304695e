"""Settings without effect are refused; every key has a reader."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from robusttrain import ranges
from robusttrain.config import schema as schemas
from robusttrain.config.build import build_component, with_numbers
from robusttrain.config.folders import CONF
from robusttrain.config.run_config import Config
from robusttrain.config.schema import GROUPS
from robusttrain.config.unread import READERS, RULES, Conditional, Effective, unread
from robusttrain.data.folder import Folder
from robusttrain.errors import InputError
from robusttrain.models.mlp import MLP
from toys.command_line import CommandLine
from toys.external import CLASSES, SHAPE, Answer, looked_at

CLEAN = ": it trains on clean images"
BUILT_IN = ": it has an attack of its own"
DISTILL = "defense=distill defense.teacher=/nowhere"

# The words of a command line, whose last one has no effect, and the cause in the message.
NO_EFFECT = {
    "defense=standard attack.steps=20": f"defense=standard{CLEAN}",
    "defense=standard attack=fgsm": f"defense=standard{CLEAN}",
    "defense=free attack.steps=20": f"defense=free{BUILT_IN}",
    "defense=n_fgsm attack.eps=0.1": f"defense=n_fgsm{BUILT_IN}",
    "defense=grad_align attack.steps=20": f"defense=grad_align{BUILT_IN}",
    "defense=rt attack.steps=20": f"defense=rt{BUILT_IN}",
    "defense=lsa attack.steps=20": f"defense=lsa{BUILT_IN}",
    "defense=alp defense.pairing=clean attack.steps=20": "defense.pairing=clean",
    "defense=trades defense.beta=0 attack.steps=20": "defense.beta=0.0",
    f"{DISTILL} defense.alpha=0 attack.steps=20": "defense.alpha=0.0",
    "training.epochs=2 epochs=3": "training.epochs=2",
    "training.batch_size=2 batch_size=3": "training.batch_size=2",
    "dataset=digits data_dir=elsewhere": "dataset=digits",
    "dataset=digits download=false": "dataset=digits",
    "dataset.extra_share=0.3": "dataset.extra=null",
    "dataset.extra_labels=y.npy": "dataset.extra=null",
    "dataset=arrays dataset.train=x.npz dataset.train_labels=y.npy": "dataset.train=x.npz",
    "dataset=huggingface dataset.path=zoo/animals dataset.test_split=test dataset.seed=3": (
        "dataset.test_split=test"
    ),
    "trust=[mine]": "checkpoint=null",
    "training.curriculum.per_batch=true": "training.curriculum.eps_warmup=0.0",
    "training.curriculum={per_batch:true}": "training.curriculum.eps_warmup=0.0",
    "defense=ibp training.curriculum.per_batch=true": "training.curriculum.eps_warmup=0.0",
    "defense=ibp training.curriculum.smoothed=true": "training.curriculum.eps_warmup=0.0",
    "defense=ibp training.curriculum.eps_delay=0.1": "training.curriculum.eps_warmup=0.0",
    "defense=standard training.curriculum.smoothed=true": "defense=standard: it has no radius",
    "defense=standard training.curriculum.eps_delay=0.1": "defense=standard: it has no radius",
    "defense=sabr attack.eps=0.2": "defense=sabr: it attacks within its own radius",
    "epochs=0 training.l1=0.1": "epochs=0: nothing is trained",
    "checkpoint=pretrained:digits-linf-0.1 model.initialisation=ibp": (
        "checkpoint=pretrained:digits-linf-0.1"
    ),
    "model.weights=pretrained:digits-linf-0.1 model.initialisation=ibp": (
        "model.weights=pretrained:digits-linf-0.1"
    ),
    "defense=standard training.curriculum.eps_warmup=0.5": "defense=standard: it has no radius",
    "defense=standard training.curriculum.per_batch=true": "defense=standard: it has no radius",
    "defense=standard training.on_overfit=stop": f"defense=standard{CLEAN}",
    "epochs=0 training.trainable=head": "epochs=0: nothing is trained",
    "epochs=0 training.batch_norm=frozen": "epochs=0: nothing is trained",
    "training.batch_norm=frozen training.sync_batchnorm=true": "training.batch_norm=frozen",
    "training.trainable=head optimizer.layer_decay=0.5": (
        "training.trainable=head: the head has the rate optimizer.lr"
    ),
    "optimizer.decay_norms_and_biases=false": "optimizer.weight_decay=0.0",
    "dataset.validation=0 training.validation_attack.steps=3": "dataset.validation=0.0",
    f"{DISTILL} training.label_smoothing=0.1": (
        "defense=distill: its targets are outputs of the teacher"
    ),
    "defense=fare training.label_smoothing=0.1": "defense=fare: it reads no labels",
    "defense=fare training.on_overfit=stop": "defense=fare: it reads no labels",
    "evaluation.audit=false evaluation.probe_samples=3": "evaluation.audit=False",
    "evaluation.audit=false evaluation.probe.steps=3": "evaluation.audit=False",
    "evaluation=verified evaluation.verification.bounds=linear evaluation.verification.steps=3": (
        "evaluation.verification.bounds=linear"
    ),
    "evaluation=standard norm=l1 evaluation.attacks.apgd_t.rho=0.5": (
        "evaluation.attacks.apgd_t.norm=l1"
    ),
    "evaluation.attacks.apgd_ce.give_up=true": "evaluation.attacks.apgd_ce.restarts=null",
    "evaluation.attacks.apgd_ce.far=0.3": "evaluation.attacks.apgd_ce.restarts=null",
    "evaluation.attacks.pgd.keep_best=true": "evaluation.attacks.pgd.stop_early=True",
    "attack.restarts=2 attack.keep_best=false": "attack.restarts=2",
    "attack=multi_targeted attack.stop_early=false attack.keep_best=true": "attack.targets=9",
    "attack=mim attack.stop_early=true attack.keep_best=true": "attack.stop_early=True",
    "attack=fab attack.minimal=true attack.give_up=true": "attack.minimal=True",
    "evaluation.attacks.uniform.mode=train": "evaluation.attacks.uniform=Uniform",
    "attack=uniform attack.label=predicted": "attack=uniform",
    "schedule=step schedule.milestones=[] schedule.gamma=0.5": "schedule.milestones=[]",
    "noise=gaussian noise.vote=majority": "noise.predict=False",
    "noise=pni_w noise.predict=false noise.vote=majority": "noise.predict=False",
    "noise=smoothing noise.draws=3": "noise.train=False",
    "noise=bayes noise.train=false noise.kl=1": "noise.train=False",
    "noise=bayes noise.kl=0 noise.prior=1": "noise.kl=0.0",
    "noise=learn2perturb noise.train=false noise.gamma=1": "noise.train=False",
}


def refusals(*words: str) -> list[str]:
    chosen = any(word.startswith("evaluation=") for word in words)
    found = dict(looked_at(*([] if chosen else ["evaluation=quick"]), *words).unread)
    if not chosen:
        found.pop("evaluation", None)
    return [str(refusal) for refusal in found.values()]


@pytest.mark.parametrize("words", NO_EFFECT)
def test_a_setting_that_nothing_reads_is_refused(words: str) -> None:
    given = words.split()
    word = given[-1].lstrip("+")
    assert refusals(*given) == [f"{word} has no effect with {NO_EFFECT[words]}"]


def test_every_rule_and_every_condition_is_tried_above() -> None:
    last = [words.split()[-1] for words in NO_EFFECT]
    tried = {word.lstrip("+").partition("=")[0] for word in last}
    for rule in RULES:
        for key in rule.keys:
            assert any(f"{one}.".startswith(f"{key}.") for one in tried), key
    assert tried >= set(READERS) - {"attack"}
    fields = {word.rpartition(".")[2] for word in tried}
    for component in COMPONENTS:
        if issubclass(component, Conditional):
            names = {field.name for field in dataclasses.fields(component)}
            returned = set(_strings(component.unused)) & names
            assert returned, component
            assert fields & returned or component is Folder, component


def _strings(function: Any) -> Iterator[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_draw_of_a_test_set_has_no_effect_with_a_test_folder(tmp_path: Path) -> None:
    words = ["dataset=folder", f"dataset.path={tmp_path}"]
    words += ["dataset.image_size=8", "dataset.seed=1", "dataset.test_share=0.5"]
    assert refusals(*words) == []
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    assert refusals(*words) == [
        f"{word} has no effect with dataset.path={tmp_path}" for word in words[-2:]
    ]


READ = [
    "attack.steps=3",
    "defense=trades attack.steps=3 attack.step_size=0.1",
    "defense=ibp training.curriculum.eps_warmup=0.3 training.curriculum.per_batch=true",
    "epochs=2 batch_size=7 optimizer.lr=0.1 dataset.crop=1",
    # The same arguments may serve both stages.
    "stages=[train] evaluation.samples=3 epochs=2 dataset.crop=1",
    "dataset=mnist data_dir=elsewhere download=false",
    "noise=gaussian noise.predict=true noise.vote=majority evaluation.votes=3",
    "noise=gaussian evaluation=certify evaluation.votes=30",
    f"{DISTILL} trust=[mine] attack.steps=4",
    "~evaluation.attacks.fgsm ~attack@evaluation.attacks.pgd",
    "experiment=mnist defense=standard",
    "experiment=mnist defense=ibp training.curriculum.per_batch=true",
    "+attack@evaluation.attacks.mim=mim evaluation.attacks.mim.decay=0.5",
    "training.curriculum={eps_warmup:0.5,per_batch:true}",
    "defense=standard eps=0.3 norm=l2 seed=3 device=cpu deterministic=true keep_memory=false",
    "logger=tensorboard model=mlp model.widths=[3]",
]


@pytest.mark.parametrize("words", READ)
def test_a_setting_that_is_read_is_accepted(words: str) -> None:
    assert refusals(*words.split()) == []


# --- an oracle: rebuild with another value ---------------------------------------------------


DEFENSES = sorted(file.stem for file in (CONF / "defense").glob("*.yaml"))
SEVERAL = "threats={linf:0.1,l2:1}"
NEEDED = {
    "avg": [SEVERAL], "distill": ["defense.teacher=/nowhere"], "eat": [SEVERAL], "ramp": [SEVERAL],
}  # fmt: skip
# What the run uses of these keys is in these components.
USERS = ("defense", "training", "dataset")


@pytest.mark.parametrize("defense", DEFENSES)
def test_what_is_unread_changes_no_component(defense: str) -> None:
    needed = NEEDED.get(defense, [])
    run = looked_at("evaluation=quick", f"defense={defense}", *needed)
    plain = OmegaConf.create(run.origin.config)
    before = _users(plain)
    attack = [f"attack.{key}" for key in plain.attack if key != "_target_"]
    for key in [*attack, "epochs", "batch_size", "data_dir", "download"]:
        value = OmegaConf.select(plain, key)
        if _another(value) == value:
            continue
        changed = OmegaConf.merge(plain)
        OmegaConf.update(changed, key, _another(value))
        try:
            matters = _users(changed) != before
        except InputError:
            # Its check fails, so it is read, or the whole attack is not.
            continue
        found = unread(run.config, run.origin.config, run.origin.names, [f"{key}=1"])
        assert bool(found) != matters, key


def _users(config: Any) -> list[object]:
    numbers = with_numbers(config)
    del numbers["_target_"]
    for part in GROUPS:
        if part not in (*USERS, "attack"):
            del numbers[part]
    built = build_component(numbers)
    return [built[part] for part in USERS]


def _another(value: object) -> object:
    """Another value of the same type, if that is possible without knowing the key."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else value


# --- every key has a reader ----------------------------------------------------------------------


COMPONENTS = [component for group in GROUPS for component in schemas.components(group)]

# Packages that read the settings of components which do not read them themselves.
CONSUMERS = {
    "dataset": ["robusttrain.training", "robusttrain.runs", "robusttrain.data"],
    "defense": ["robusttrain.training"],
    "evaluation": ["robusttrain.evaluation", "robusttrain.runs"],
    "noise": ["robusttrain.noise"],
    "optimizer": ["robusttrain.training"],
    "training": ["robusttrain.training", "robusttrain.runs"],
}

# Keys of the run that every run reads, at least in one of its stages.
ALWAYS = {
    *GROUPS, "norm", "eps", "seed", "device", "stages", "checkpoint", "resume", "deterministic",
    "keep_memory", "verbosity", "report", "threats",
}  # fmt: skip


def test_every_key_of_a_run_is_read_always_or_by_reference() -> None:
    """A new key or group has to be put into one of these tables."""
    fields = {field.name for field in dataclasses.fields(Config) if not field.metadata}
    assert fields == ALWAYS | set(READERS)


def _nested(component: type) -> Iterator[type]:
    """A component, and the settings that its fields hold."""
    yield component
    for field in dataclasses.fields(component):
        if isinstance(field.default_factory, type) and dataclasses.is_dataclass(
            field.default_factory
        ):
            yield from _nested(field.default_factory)


def unread_fields(component: type, consumers: list[str]) -> set[str]:
    """The fields that no code reads, except to check or to convert them."""
    own = {field.name for field in dataclasses.fields(component) if field.init}
    for base in component.__mro__:
        if base.__module__.startswith("robusttrain") or base is component:
            own -= set(_read_in(textwrap.dedent(inspect.getsource(base)), of_self=True))
    for package in consumers:
        for source in _sources(package):
            own -= _read_outside(source)
    return own


@cache
def _sources(package: str) -> list[str]:
    found = importlib.import_module(package)
    names = [f"{package}.{module.name}" for module in pkgutil.iter_modules(found.__path__)]
    return [inspect.getsource(importlib.import_module(name)) for name in names]


@cache
def _read_outside(source: str) -> set[str]:
    return set(_read_in(source, of_self=False))


DECLARATIONS = ("unused", "refuse_without_effect")


def _read_in(source: str, *, of_self: bool) -> Iterator[str]:
    """The attributes of `self`, or of other objects, that code reads."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef) and node.name in DECLARATIONS:
            continue
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("ranges."):
            continue
        if isinstance(node, ast.Assign) and _converts(node):
            continue
        if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)):
            pending += ast.iter_child_nodes(node)
            continue
        # `self.settings.width` reads `width` of another object.
        if (ast.unparse(node.value) == "self") == of_self:
            yield node.attr
        pending += ast.iter_child_nodes(node)


def _converts(node: ast.Assign) -> bool:
    """Whether fields are assigned to themselves, as another type."""
    targets = {ast.unparse(each) for target in node.targets for each in _elements(target)}
    return any(
        target.startswith("self.") and target in ast.unparse(node.value) for target in targets
    )


def _elements(target: ast.expr) -> list[ast.expr]:
    return target.elts if isinstance(target, ast.Tuple) else [target]


@pytest.mark.parametrize("group", GROUPS)
def test_every_key_of_every_group_has_a_reader(group: str) -> None:
    for component in schemas.components(group):
        for each in _nested(component):
            assert unread_fields(each, CONSUMERS.get(group, [])) == set(), each


def test_a_key_without_a_reader_is_found() -> None:
    @dataclasses.dataclass
    class Widths(MLP):
        dead: int = 3
        checked: int = 3
        converted: str = ""
        read: int = 3

        def __post_init__(self) -> None:
            super().__post_init__()
            ranges.at_least(0, checked=self.checked)
            self.converted = str(self.converted)

        def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> torch.nn.Module:
            return MLP([self.read]).build(num_classes, image_shape)

    assert unread_fields(Widths, []) == {"dead", "checked", "converted"}


# --- components without effect --------------------------------------------------------------------

WITHOUT = {
    "noise=gaussian noise.train=false": "noise.train=False",
    "noise=gaussian noise.sigma=0": "noise.sigma=0",
    "noise=laplace noise.sigma=0": "noise.sigma=0",
    "noise=dropout noise.p=0": "noise.p=0.0",
    "noise=rse noise.initial=0 noise.inner=0": "noise.initial=0.0",
    "noise=pni_w noise.train=false noise.predict=false": "noise.train=False",
    "noise=stack +noise@noise.mechanisms.a=rse +noise@noise.mechanisms.b=uniform "
    "noise.mechanisms.b.sigma=0": "noise.mechanisms.b.sigma=0",
    "weight_perturbation=awp weight_perturbation.gamma=0": "weight_perturbation.gamma=0.0",
    "weight_perturbation=awp weight_perturbation.warmup=1": "weight_perturbation.warmup=1.0",
    "averaging=ema averaging.decay=0": "averaging.decay=0.0",
    "defense=crown_ibp defense.linear_share=0": "defense.linear_share=0.0",
    "defense=sabr defense.box_share=1": "defense.box_share=1.0",
    "optimizer=sgd optimizer.momentum=5": "optimizer.momentum=5.0",
    "norm=l2 defense=trades attack=carlini_wagner": "attack=CarliniWagner",
    f"{DISTILL} attack=square": "attack=Square",
    "defense=trades attack=apgd_t": "attack=APGD",
}


@pytest.mark.parametrize("words", WITHOUT)
def test_a_component_without_effect_is_refused(words: str) -> None:
    with pytest.raises(InputError) as caught:
        looked_at("evaluation=quick", *words.split())
    assert str(caught.value).startswith(f"{WITHOUT[words]} is not allowed: it must be ")


def test_every_such_component_is_tried_above() -> None:
    tried = {type(getattr(looked_at_without(words), words.split("=")[0], None)) for words in GIVEN}
    effective = {component for component in COMPONENTS if issubclass(component, Effective)}
    bases = {base for component in tried for base in component.__mro__}
    for component in effective:
        own = next(base for base in component.__mro__ if "refuse_without_effect" in vars(base))
        assert own in bases, component


# The options of the components above, with their defaults.
GIVEN = (
    "noise=gaussian", "noise=dropout", "noise=rse", "noise=pni_w", "weight_perturbation=awp",
    "averaging=ema", "defense=crown_ibp", "defense=sabr",
)  # fmt: skip


def looked_at_without(words: str) -> Config:
    return looked_at("evaluation=quick", words).config


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant", "step"])
def test_swa_needs_a_learning_rate_that_stays_high(schedule: str) -> None:
    words = ["evaluation=quick", "averaging=swa", f"schedule={schedule}"]
    if schedule in ("constant", "step"):
        looked_at(*words)
        return
    with pytest.raises(InputError, match=r"^averaging=swa needs a learning rate that stays high"):
        looked_at(*words)


# --- the command line ----------------------------------------------------------------------------


SHORT = [
    "dataset=synthetic", "dataset.train_size=96", "dataset.test_size=40", "device=cpu",
    "dataset.image_shape=[1,8,8]", f"dataset.num_classes={CLASSES}", "model=mlp",
    "model.widths=[4]",
]  # fmt: skip
TRAINS = [*SHORT, "batch_size=32", "epochs=1"]


def test_a_run_is_refused_before_it_leaves_anything(
    command_line: CommandLine, tmp_path: Path
) -> None:
    words = [*TRAINS, "defense=standard", "attack.steps=20"]
    answer = command_line.run(*words, cwd=tmp_path)
    assert answer.code == 1
    assert (
        answer.err == f"robusttrain: attack.steps=20 has no effect with defense=standard{CLEAN}\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_shifts_by_more_than_an_image_are_refused(
    command_line: CommandLine, tmp_path: Path
) -> None:
    answer = command_line.run(*TRAINS, "dataset.crop=50", cwd=tmp_path)
    assert answer.code == 1
    assert "dataset.crop=50 is not allowed: it must be less than the 8 pixels" in answer.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    Answer(folder, *TRAINS, "stages=[train]", "dataset.crop=1", "defense=standard")
    return folder


EVALUATED = {
    "": "",
    "defense=standard epochs=1 dataset.crop=1": "",
    "eps=0.3 noise=smoothing evaluation.votes=30": "",
    "trust=[mine] evaluation.samples=3": "",
    "attack.steps=10": f"attack.steps=10 has no effect with defense=standard{CLEAN}",
    "data_dir=elsewhere": "data_dir=elsewhere has no effect with dataset=synthetic",
}


@pytest.mark.parametrize("words", EVALUATED)
def test_an_evaluation_has_the_defense_of_its_checkpoint(words: str, trained: Path) -> None:
    found = refusals(f"checkpoint={trained}", "stages=[evaluate]", *words.split())
    assert "".join(found).startswith(EVALUATED[words])
    assert bool(found) == bool(EVALUATED[words])


FOREIGN = {
    "defense=trades averaging=ema": "",
    "defense=trades defense.beta=3 epochs=3": "",
    "defense=standard attack.steps=3": f"attack.steps=3 has no effect with defense=standard{CLEAN}",
}


@pytest.mark.parametrize("words", FOREIGN)
def test_a_model_from_elsewhere_has_that_of_the_command_line(words: str, tmp_path: Path) -> None:
    torch.save(MLP([4]).build(CLASSES, SHAPE).state_dict(), tmp_path / "theirs.pt")
    given = [*SHORT, f"checkpoint={tmp_path / 'theirs.pt'}", "stages=[evaluate]"]
    assert "".join(refusals(*given, *words.split())) == FOREIGN[words]


def test_an_interrupted_run_of_an_earlier_version_is_resumed(
    command_line: CommandLine, tmp_path: Path
) -> None:
    """Its command may have settings that are refused today."""
    words = [*TRAINS, "evaluation=quick", "evaluation.audit=false", "hydra.run.dir=run"]
    first = command_line.run(*words, "defense=standard", cwd=tmp_path)
    assert first.code == 0, first.said
    (tmp_path / "run" / "manifest.json").unlink()
    command = tmp_path / "run" / "command.json"
    old = ["attack.steps=3", "averaging=ema", "averaging.decay=0"]
    added = ", ".join(f'"{word}"' for word in old)
    command.write_text(
        command.read_text().replace('"defense=standard"', f'"defense=standard", {added}')
    )
    for path in (tmp_path / "run").glob("*.pt"):
        path.unlink()
    again = command_line.run("resume=run", cwd=tmp_path)
    assert again.code == 0, again.said


SWEEPS: Mapping[str, tuple[str, ...]] = {
    "attack.steps=1 has no effect with defense=standard": (
        "defense=standard,free", "attack.steps=1,2",
    ),
    "training.curriculum.per_batch=true has no effect": (
        "defense=madry,trades", "training.curriculum.per_batch=true",
    ),
    "": ("defense=standard,madry", "attack.steps=1"),
}  # fmt: skip


@pytest.mark.parametrize("message", SWEEPS)
def test_a_sweep_is_refused_if_no_job_reads_a_setting(
    message: str, command_line: CommandLine, tmp_path: Path
) -> None:
    words = ["-m", *TRAINS, "stages=[train]", "hydra.sweep.dir=sweep", *SWEEPS[message]]
    answer = command_line.run(*words, cwd=tmp_path)
    assert answer.code == bool(message), answer.said
    assert message in answer.err
    assert (tmp_path / "sweep").exists() != bool(message)


SEARCHES = {
    "attack.step_size=0.1 has no effect": "defense=choice(standard,free)",
    "": "defense=choice(standard,madry)",
}


@pytest.mark.parametrize("message", SEARCHES)
def test_a_search_is_represented_by_one_value_of_each_range(
    message: str, command_line: CommandLine, tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = [
        "-m", *TRAINS, "stages=[train]", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=1",
        SEARCHES[message], "attack.step_size=interval(0.1,0.2)",
    ]  # fmt: skip
    answer = command_line.run(*words, cwd=tmp_path)
    assert answer.code == bool(message), answer.said
    assert message in answer.err
