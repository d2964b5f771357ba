"""The three drafts, and prompt lookup: one file per algorithm, one shape for all."""

from deepspec.drafts.base import Draft, DraftSpec, LossSettings, LossSums, NeuralDraft, Proposal
from deepspec.drafts.dflash import DFlashDraft
from deepspec.drafts.dspark import DSparkDraft
from deepspec.drafts.eagle3 import Eagle3Draft
from deepspec.drafts.lookup import PromptLookup

ALGORITHMS: dict[str, type[Eagle3Draft] | type[DFlashDraft] | type[DSparkDraft]] = {
    "eagle3": Eagle3Draft,
    "dflash": DFlashDraft,
    "dspark": DSparkDraft,
}

__all__ = [
    "ALGORITHMS",
    "DFlashDraft",
    "DSparkDraft",
    "Draft",
    "DraftSpec",
    "Eagle3Draft",
    "LossSettings",
    "LossSums",
    "NeuralDraft",
    "PromptLookup",
    "Proposal",
]
