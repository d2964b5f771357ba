"""The terms of the loss by name, without torch: recipes and drafts ask which of them need the teacher."""

from __future__ import annotations

TERMS = {"ce": False, "soft_ce": True, "l1": True}
"""Whether a term compares with the target's distribution (the teacher), and not with the label alone."""
