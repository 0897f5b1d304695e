"""The checks of an audit in words: what each one asks, what a bad figure means, what to do next."""

from collections.abc import Mapping
from typing import NamedTuple


class Advice(NamedTuple):
    """What a reader needs to know about a check.

    Parameters
    ----------
    question
        What the check asks.
    meaning
        What it can mean if it warns or fails.
    action
        What to do then.
    """

    question: str
    meaning: str
    action: str


ADVICE: Mapping[str, Advice] = {
    "suite at eps 0 differs from clean by": Advice(
        "Do the attacks break nothing if they may change nothing?",
        "Clean and attacked images are scored differently: other labels, another order, other "
        "preprocessing, or noise that is drawn anew.",
        "Compare the predictions on the same images with and without an attack of radius 0. If the "
        "model draws noise, raise evaluation.votes.",
    ),
    "accuracy rises with eps by": Advice(
        "Does a larger radius never make the model safer?",
        "The search is weak at larger radii: its steps are too short for them, or the loss is "
        "flat or rugged there.",
        "Raise evaluation.probe.steps, and look at the curve over the radius: it must fall.",
    ),
    "accuracy rises with steps by": Advice(
        "Do more steps never find less?",
        "The steps are too long and overshoot, or the gradients are random.",
        "Lower the step size of the attack. If the model draws noise, raise evaluation.eot.",
    ),
    "the last doubling of steps gains": Advice(
        "Has the search converged?",
        "More steps still find more, so that the figures are too high.",
        "Evaluate with more steps, or with evaluation=autoattack.",
    ),
    "accuracy rises with restarts by": Advice(
        "Do five searches never find less than one?",
        "The model or the attack is random in a way that one search can exploit by luck.",
        "Declare the noise of the model, and raise evaluation.votes and evaluation.eot.",
    ),
    "one step beats many by": Advice(
        "Do many small steps find at least what one large step finds?",
        "The loss is rugged: a small step sees slopes that lead nowhere. Defenses that mask "
        "gradients and catastrophic overfitting cause this.",
        "Train with more steps (attack=pgd), and evaluate with evaluation=full.",
    ),
    "suite breaks more than the probe by": Advice(
        "Does a plain search find nearly as much as the whole suite?",
        "A plain search converges to points that are not the worst, as with logit pairing. A "
        "weaker evaluation would have overrated this model.",
        "Quote the worst case of the suite only, and add attacks: evaluation=full.",
    ),
    "probe breaks more than the suite by": Advice(
        "Is the suite at least as strong as a plain search?",
        "The attacks of the suite are too weak: too few steps, or poor settings.",
        "Add a strong attack, such as evaluation=standard. The worst case includes what the plain "
        "search has found on its images; on the others it is too high.",
    ),
    "random noise beats gradients by": Advice(
        "Do gradients find at least what random noise finds?",
        "Gradients do not point to adversarial images: they are masked.",
        "Attack without gradients: attack=square and attack=decision_based, or evaluation=full.",
    ),
    "linf 0.5 leaves an accuracy of": Advice(
        "Does an attack that may turn every image grey leave nothing but guessing?",
        "Gradients are masked: the search misses images that are certainly within its reach.",
        "Look for saturated or quantised layers and for thresholds, and attack without gradients.",
    ),
    "gradients that are zero: %": Advice(
        "Does every image have a gradient to follow?",
        "Saturated outputs, quantised inputs or thresholds leave gradient attacks without a "
        "direction.",
        "Attack a smooth copy of the model (attack=transfer), or attack without gradients.",
    ),
    "non-finite gradients, %": Advice(
        "Are all gradients finite?",
        "The model has numerical trouble, such as a logarithm of 0 or a root at 0.",
        "Make the layers stable, or evaluate in a wider number format.",
    ),
    "misleading gradients, %": Advice(
        "Do outputs change along a gradient as the gradient predicts?",
        "The backward pass does not belong to the outputs: a layer replaces its gradient, or "
        "jumps.",
        "Check layers with a backward pass of their own, and attack without gradients.",
    ),
    "a smaller ball is weaker by": Advice(
        "Do searches in a smaller ball break nothing that those in the whole ball miss?",
        "The model is weak inside the ball, where searches do not end. It may have learnt to "
        "resist at the training radius only.",
        "Train at random radii, and evaluate at smaller eps, too.",
    ),
    "black box beats gradients by": Advice(
        "Do gradients find at least what a search without gradients finds?",
        "Gradients are hidden. Attacks that follow them overrate this model.",
        "Do not quote the figures. Find the layer that hides gradients, and attack around it "
        "(attack=transfer), or use evaluation=full with more queries.",
    ),
    "non-finite outputs, %": Advice(
        "Are all outputs finite?",
        "The model has numerical trouble; images with such outputs count as misclassified.",
        "Make the layers stable, or evaluate in a wider number format.",
    ),
    "outputs that are probabilities: %": Advice(
        "Does the model return logits?",
        "The model ends with a softmax. Attacks work on its inputs, but margins are those of "
        "probabilities.",
        "Remove the softmax from the model if you need margins in logits.",
    ),
    "undeclared draws change outputs by %": Advice(
        "Does the model answer alike if it is asked twice?",
        "Dropout or batch statistics are active, or the model draws random numbers by itself.",
        "Set the model to eval mode, or declare its noise (noise=...), so that attacks average "
        "over it.",
    ),
    "BatchNorm modes differ by": Advice(
        "Do running statistics fit the data?",
        "The model classifies worse with its running statistics than with those of a batch: they "
        "are of other data, or too old.",
        "Update the statistics on clean training images, and evaluate again.",
    ),
    "80 instead of 20 draws gain": Advice(
        "Are twenty draws of noise enough for the attack?",
        "With more draws the attack still finds more, so that the figures are too high.",
        "Raise evaluation.eot until the curve over draws is flat.",
    ),
    "accuracy lost with fixed or no noise": Advice(
        "Does the robustness come from the network, and not from its noise?",
        "An attacker who knows the noise, or averages it out, succeeds more often.",
        "Say so beside the figures: they hold only while the noise stays unknown to attackers.",
    ),
    "invalid adversarial images": Advice(
        "Does every attack stay within its threat model?",
        "An attack returns images that it must not return. They count as not broken, so that the "
        "row of this attack is meaningless.",
        "Correct the attack: its images must be finite, in [0, 1] and within the radius.",
    ),
    "certificates broken by an attack": Advice(
        "Do certificates hold against attacks?",
        "A certificate is wrong more often than chance allows: certification or the noise of the "
        "model is broken.",
        "Do not quote the certificates. Check that the model is evaluated with the noise that it "
        "was certified with.",
    ),
    "proven images broken by an attack": Advice(
        "Do proofs hold against attacks?",
        "A proof is wrong: the bounds of a layer are not bounds.",
        "Do not quote the proofs. Check the layers of your own model.",
    ),
    "radii broken below a proven one": Advice(
        "Does nothing break an image within the radius that is proven for it?",
        "A proof is wrong: the bounds of a layer are not bounds.",
        "Do not quote the proven radii. Check the layers of your own model.",
    ),
    "bounds above the margin of an attacked image": Advice(
        "Are bounds below what attacks reach?",
        "A bound is wrong: an attacked image has a smaller margin than the bound allows.",
        "Do not quote the proofs. Check the layers of your own model.",
    ),
    "images on which verification failed": Advice(
        "Did every method of verification finish?",
        "A method ran out of memory or raised an error on some images, and may have proven them.",
        "Read undecided_because in samples.csv. Use a device with more memory, or skip the method "
        "(evaluation.verification.bounds, evaluation.verification.branching).",
    ),
    "counterexamples that were not repeated": Advice(
        "Do counterexamples hold on a fresh copy of the model, in float32 and float64?",
        "Some points are so close to a boundary that rounding decides their class.",
        "Nothing, if they are few: only those that float32 misclassifies count as broken.",
    ),
}
"""By the name of the check in `audit.csv`, without what stands in brackets behind it."""


def advice(check: str) -> Advice | None:
    """The texts of a check; None for one that this version does not know."""
    return ADVICE.get(check.partition(" (")[0])
