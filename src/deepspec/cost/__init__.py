"""What a recipe takes, before anything runs: `deepspec plan`.

`costs` holds every formula once, `machines` rows of data, `counts` how much data there is, `asked` all that a
plan depends on, `room` bytes, `hours` operations and seconds (`phases`: of each part), `figures` the plan
itself, `changes` what makes it fit. `deepspec.speeds` measures.
"""

from deepspec.cost.asked import Choices
from deepspec.cost.changes import Change, cheapest_change
from deepspec.cost.costs import cache_bytes, cache_bytes_per_token, dimensions
from deepspec.cost.counts import Counts, assumed_counts, published_counts
from deepspec.cost.figures import Plan, make_plan
from deepspec.cost.machines import MACHINES, Machine

__all__ = [
    "MACHINES",
    "Change",
    "Choices",
    "Counts",
    "Machine",
    "Plan",
    "assumed_counts",
    "cache_bytes",
    "cache_bytes_per_token",
    "cheapest_change",
    "dimensions",
    "make_plan",
    "published_counts",
]
