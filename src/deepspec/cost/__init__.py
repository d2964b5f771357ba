"""What a recipe takes, before anything runs: `deepspec plan`. Arithmetic only: no torch, no transformers."""

from deepspec.cost.fit import Change, cheapest_change
from deepspec.cost.inputs import Counts, Inputs, assumed_counts, published_counts
from deepspec.cost.machines import MACHINES, Machine
from deepspec.cost.plan import Plan, make_plan

__all__ = [
    "MACHINES",
    "Change",
    "Counts",
    "Inputs",
    "Machine",
    "Plan",
    "assumed_counts",
    "cheapest_change",
    "make_plan",
    "published_counts",
]
