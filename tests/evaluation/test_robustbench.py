"""The evaluation of RobustBench on a model that was trained here, as the manual has it."""

import pytest
import torch

from robusttrain import load_pretrained
from robusttrain.attacks.pgd import PGD
from robusttrain.data.digits import Digits

# It needs AutoAttack from its authors' repository, and holds other packages at old versions.
evaluation = pytest.importorskip(
    "robustbench.eval", reason="RobustBench is not installed", exc_type=ImportError
)

COUNT, EPS = 40, 0.1


@pytest.mark.filterwarnings("ignore")
def test_robustbench_counts_the_clean_images_and_breaks_what_pgd_breaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, labels = (part[:COUNT] for part in Digits().load()[1])
    images, model = images / 255, load_pretrained("digits-linf-0.1")
    monkeypatch.setattr(evaluation, "load_clean_dataset", lambda *_: (images, labels))

    clean, robust = evaluation.benchmark(
        model, n_examples=COUNT, dataset="cifar10", threat_model="Linf", eps=EPS
    )

    assert clean == pytest.approx(float((model(images).argmax(1) == labels).float().mean()))
    attacked = PGD(eps=EPS, steps=20)(
        model, images, labels, generator=torch.Generator().manual_seed(0)
    )
    assert robust <= float((model(attacked).argmax(1) == labels).float().mean()) + 1 / COUNT
    assert robust > 0.5
