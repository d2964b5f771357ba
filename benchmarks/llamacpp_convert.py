"""llama.cpp's converter for a tokenizer that it cannot know. First word: its source tree; then its own words.

It recognises a BPE tokenizer by a hash of what the tokenizer makes of a fixed text. The pocket tokenizer,
which it does not know, splits text by Qwen2's regular expression, so it is converted as Qwen2's.
"""

import sys
from typing import Any

source = sys.argv.pop(1)
sys.path.insert(0, source)

import convert_hf_to_gguf  # noqa: E402 - found through the path above
from conversion.base import TextModel  # noqa: E402

known = TextModel.get_vocab_base_pre


def base_pre(self: Any, tokenizer: Any) -> str:
    try:
        return str(known(self, tokenizer))
    except NotImplementedError:
        return "qwen2"


TextModel.get_vocab_base_pre = base_pre
convert_hf_to_gguf.main()
