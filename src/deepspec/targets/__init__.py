"""The model that is made faster: what is known of it without its weights, and the frozen model itself."""

from deepspec.targets.model import StepOutput, Target
from deepspec.targets.spec import TargetSpec

__all__ = ["StepOutput", "Target", "TargetSpec"]
