"""The threat models that a program gives: one, or several by their norms."""

from collections.abc import Mapping
from typing import cast

from robusttrain import ranges
from robusttrain.threat import Norm, Threat, of_radii


def own_threat(
    eps: float | None, norm: Norm | str, threats: Mapping[str, float] | None, needed: str
) -> Threat:
    """The threat model of `norm` and `eps`, or the one of `threats` that `norm` chooses.

    If `norm` is none of theirs, it is the first. `needed` says when `eps` is, for messages.

    Raises
    ------
    InputError
        If `eps` is missing, or given with `threats`; or if there is no such norm.
    """
    if not threats:
        ranges.require(eps is not None, "eps", None, needed)
        assert eps is not None, "it was checked"
        return Threat(cast(Norm, norm), eps)
    ranges.require(eps is None, "eps", eps, "left out: threats has the radius of each norm")
    found = of_radii(threats)
    return next((threat for threat in found if threat.norm == norm), found[0])
