"""What a model cannot do in a run is found before any work."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from robusttrain.errors import InputError
from robusttrain.runs.context import RunContext
from robusttrain.runs.inputs import inputs_of
from robusttrain.runs.rehearsal import rehearse
from toys.external import SHAPE, TINY, Answer, prepared
from toys.training import quiet

MINE = """

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint



class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh())
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


class Squeezed(Net):
    def forward(self, x):
        return self.head(self.body(x)).squeeze()


class Checkpointed(Net):
    def forward(self, x):
        hidden = checkpoint(self.body, x, use_reentrant=True)
        return self.head(hidden)


class InTraining(Checkpointed):
    def forward(self, x):
        return super().forward(x) if self.training else self.head(self.body(x))


class Raises(Net):
    def forward(self, x):
        if self.training:
            raise KeyError("no such thing")
        return super().forward(x)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


class OnceDifferentiable(Net):
    def forward(self, x):
        return super().forward(Once.apply(x))


class Cut(Net):
    def forward(self, x):
        return super().forward(x.detach())


class Raising:
    def __call__(self, model, x, y, *, loss=None, generator=None):
        raise RuntimeError("no such luck")
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "rehearsed.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    for name in (
        "Net",
        "Squeezed",
        "Checkpointed",
        "InTraining",
        "Raises",
        "OnceDifferentiable",
        "Cut",
    ):
        file = tmp_path / "conf" / "model" / f"{name.lower()}.yaml"
        file.write_text(f"_target_: rehearsed.{name}\n")
    (tmp_path / "conf" / "attack").mkdir()
    (tmp_path / "conf" / "attack" / "raising.yaml").write_text("_target_: rehearsed.Raising\n")
    return [f"hydra.searchpath=[file://{tmp_path / 'conf'}]", *TINY]


REFUSED = {
    "model=squeezed": r"^model=squeezed returns a tensor of shape \(5,\) for 1 image in eval mode: "
    r"it must return logits of shape \(1, 5\)",
    "model=checkpointed": r"^model=checkpointed cannot be trained with defense=.*: .*use_reen",
    "model=checkpointed defense=standard": r"^model=checkpointed has no gradient that attacks can ",
    "model=intraining defense=rt": r"^model=intraining cannot be trained with defense=rt: .*use_re",
    "model=raises": r"^model=raises fails for 2 images in train mode: .*no such thing",
    "model=net batch_size=1": r"^batch_size=1 is too small for model=net: take 2 or more; Expected",
    "model=oncedifferentiable defense=rt": r"^model=oncedifferentiable cannot be trained with "
    r"defense=rt: .*once_differentiable",
    "model=cut": r"^model=cut ",
    "model=cut defense=standard": r"^model=cut passes no gradient to its images",
    "model=mlp defense=rt training.compile=true": r"^training\.compile=true is not allowed: it "
    r"must be false with defense=rt: ",
    "model=mlp defense=grad_align training.compile=true": r"^training\.compile=true is not allowed",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_would_fail_is_refused_before_data_are_read(
    words: str, mine: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robusttrain.runs.experiment.data_of", None)
    with pytest.raises(InputError, match=REFUSED[words]):
        Answer(tmp_path / "run", *mine, *words.split())
    assert list((tmp_path / "run").iterdir()) == []


def test_what_works_in_the_modes_of_the_run_is_not_refused(mine: list[str], tmp_path: Path) -> None:
    """Attacks see eval mode, where this network has no checkpoint."""
    brief = ["stages=[train]", "attack.steps=1", "dataset.validation=0"]
    Answer(tmp_path / "run", *mine, "model=intraining", "defense=madry", *brief)
    assert (tmp_path / "run" / "best.pt").is_file()


@pytest.mark.parametrize(
    "words",
    [
        "defense=free noise=gaussian",
        "defense=rt noise=none",
        "defense=grad_align noise=learn2perturb",
        "defense=mart noise=dropout",
        "defense=ibp model=mlp",
    ],
)
def test_a_rehearsal_leaves_everything_as_it_was(words: str, tmp_path: Path) -> None:
    network = (
        [] if "model=" in words else ["model=preact_resnet18", "model.width=2", "model.blocks=[1]"]
    )
    config, origin = prepared(*TINY, *network, *words.split())
    device = torch.device("cpu")
    context = RunContext(config, origin, config.dataset.info(), device, tmp_path, quiet())
    inputs = inputs_of(context)
    frozen_layer = next(inputs.model.children())
    frozen_layer.eval()
    tensors = {**dict(inputs.model.named_parameters()), **dict(inputs.model.named_buffers())}
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in tensors.items()}
    modes = [module.training for module in inputs.model.modules()]
    streams, state = torch.get_rng_state(), copy.deepcopy(vars(inputs.defense))
    rehearse(context, inputs)
    after = {**dict(inputs.model.named_parameters()), **dict(inputs.model.named_buffers())}
    for name, (place, values) in before.items():
        assert after[name].data_ptr() == place
        assert torch.equal(after[name], values)
    assert all(parameter.grad is None for parameter in inputs.model.parameters())
    assert all(parameter.requires_grad for parameter in inputs.model.parameters())
    assert [module.training for module in inputs.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), streams)
    assert repr(vars(inputs.defense)) == repr(state)
    # Noise draws what it would have drawn.
    x = torch.rand(3, *SHAPE)
    outputs = [each.model.train()(x) for each in (inputs, inputs_of(context))]
    assert torch.equal(*outputs)


SEARCHES = {
    "attack=multi_targeted": r"^attack\.targets=9 is not allowed: it must be 4 for 5 classes$",
    "attack=transfer attack.attack.targets=9": (
        r"^attack\.attack\.targets=9 is not allowed: it must be 4 for 5 classes$"
    ),
    "attack=pgd attack.objective=dlr dataset.num_classes=2": (
        r"^attack\.objective=dlr is not allowed: it must be margin for 2 classes$"
    ),
    "attack=raising": r"^model=mlp cannot be trained with defense=.*: no such luck$",
    "attack=transfer": r"^attack\.source cannot take images of shape \(1, 8, 8\): ",
    "+attack@evaluation.attacks.mine=raising": (
        r"^evaluation\.attacks\.mine cannot attack model=mlp: no such luck$"
    ),
    "+attack@evaluation.attacks.mine=transfer": (
        r"^evaluation\.attacks\.mine\.source cannot take images of shape \(1, 8, 8\): "
    ),
    "attack@training.validation_attack=raising": (
        r"^training\.validation_attack cannot attack model=mlp: no such luck$"
    ),
}


@pytest.mark.parametrize("words", SEARCHES)
def test_attacks_that_would_fail_are_refused_before_data_are_read(
    words: str, mine: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robusttrain.runs.experiment.data_of", None)
    # Its source takes images of another size.
    torch.manual_seed(0)
    monkeypatch.setattr("robusttrain.load_model", lambda run, trust: nn.Linear(7, 5))
    place = next((w for w in words.split() if w.endswith("=transfer")), None)
    run = (
        [f"{place.lstrip('+').rpartition('@')[2].removesuffix('=transfer')}.source.run=x"]
        if place
        else []
    )
    with pytest.raises(InputError, match=SEARCHES[words]):
        Answer(tmp_path / "run", *mine, "model=mlp", *words.split(), *run)
    assert list((tmp_path / "run").iterdir()) == []
