"""The policies by the names that command lines give them."""

from __future__ import annotations

from contextlib import suppress

from deepspec.schedule.auto import Auto
from deepspec.schedule.costs import StepCosts
from deepspec.schedule.policies import NONE, Budget, EarlyStop, Fixed, Policy, Threshold

COSTLY = ("early-stop", "budget", "auto")
"""Policies that compare step costs."""
NAMES = "all, none, fixed:K, threshold:C, early-stop, budget or auto"


def policy_of(text: str, costs: StepCosts | None = None, block: int = 0) -> Policy | None:
    """A policy by its name (`NAMES`); None for `all`.

    block: γ. Raises ValueError for any other text, and for a policy of `COSTLY` without step costs.
    """
    name, _, value = text.partition(":")
    with suppress(ValueError):
        if text == "all":
            return None
        if text == "none":
            return NONE
        if name == "fixed" and int(value) >= 0:
            return Fixed(int(value))
        if name == "threshold" and 0 <= float(value) <= 1:
            return Threshold(float(value))
    if text not in COSTLY:
        raise ValueError(
            f"{text!r} is not a policy: write {NAMES} (K proposals of each round; each row up to its first "
            "confidence below C)"
        )
    if costs is None:
        raise ValueError(f"the policy {text!r} compares step costs, and there are none: add --costs FILE")
    seconds = costs.rounds()
    return (
        Auto(seconds, block) if text == "auto" else {"early-stop": EarlyStop, "budget": Budget}[text](seconds)
    )
