"""Train a small network against PGD, and find out how robust it is.

python examples/train_and_evaluate.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import robusttrain as rt

EPS = 0.1
TEST = 200


def main() -> None:
    """Train on the digits of scikit-learn, and evaluate on images that were not trained on."""
    digits = load_digits()
    # Pixels in [0, 1] and shape (N, C, H, W): eps is in units of pixels.
    images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
    labels = torch.from_numpy(digits.target)
    torch.manual_seed(0)
    order = torch.randperm(len(labels))
    train, test = order[TEST:], order[:TEST]

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    defense = rt.defenses.WorstCase(rt.attacks.PGD(steps=5))
    training = rt.train(
        model, images[train], labels[train], defense=defense, eps=EPS, epochs=8, batch_size=64,
        overrides=["optimizer.lr=0.01"],
    )  # fmt: skip
    for epoch in training:
        print(f"epoch {epoch.epoch}: validation {epoch.val_robust_accuracy:.1%} under attack")

    result = rt.evaluate(model, images[test], labels[test], eps=EPS, evaluation="quick")
    print(result)
    result.save("outputs/train_and_evaluate")


if __name__ == "__main__":
    main()
