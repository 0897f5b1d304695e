"""The checks of an audit as people read them."""

from collections.abc import Mapping, Sequence
from typing import Any


def titled(checks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `audit.csv`; where several threat models were audited, checks name theirs.

    Files of earlier versions do not have the columns `norm` and `eps`.
    """
    norms = {check.get("norm") or "" for check in checks}
    several = len(norms - {""}) > 1
    return [
        {**check, "check": f"{check['check']} ({check['norm']})"}
        if several and check["norm"]
        else dict(check)
        for check in checks
    ]
