"""deepspec: make a language model faster without changing its output.

    import deepspec
    target = deepspec.Target.from_pretrained("pocket")
    draft = deepspec.load_draft("pocket-dspark", target)
    out = deepspec.generate(target, draft, input_ids, max_new_tokens=48)

Names are imported when first used: `import deepspec` alone loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepspec.checkpoints.draft import load_draft
    from deepspec.config import Recipe, load_recipe
    from deepspec.decode.engine import Decoder, Event, Generation, Request, generate
    from deepspec.demo import quickstart
    from deepspec.errors import UserError
    from deepspec.maths.verify import Sampling, verify
    from deepspec.measure.evaluate import evaluate_draft, evaluate_drafts, load_prompts
    from deepspec.targets import Target, TargetSpec
    from deepspec.train.loop import train_draft

__version__ = "0.1.0"
_HOMES = {
    "Decoder": "decode.engine",
    "Event": "decode.engine",
    "Generation": "decode.engine",
    "Recipe": "config",
    "Request": "decode.engine",
    "Sampling": "maths.verify",
    "Target": "targets",
    "TargetSpec": "targets",
    "UserError": "errors",
    "evaluate_draft": "measure.evaluate",
    "evaluate_drafts": "measure.evaluate",
    "generate": "decode.engine",
    "load_draft": "checkpoints.draft",
    "load_prompts": "measure.evaluate",
    "load_recipe": "config",
    "quickstart": "demo",
    "train_draft": "train.loop",
    "verify": "maths.verify",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deepspec' has no attribute {name!r}")
    return getattr(import_module(f"deepspec.{_HOMES[name]}"), name)
