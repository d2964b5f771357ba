"""The servers that drafts are exported to: how each is started, how it names a draft, what it cannot run.

The facts were read from the servers' own loaders (docs/serving.md has the versions).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, NamedTuple

from deepspec.drafts import ALGORITHMS
from deepspec.drafts.spec import DraftSpec
from deepspec.errors import UserError

if TYPE_CHECKING:
    from deepspec.targets import Target

NATIVE = "deepspec"
"""The name of the released layout, which belongs to no server."""
GGUF = "gguf"
"""The name of llama.cpp's own file format: what its converter makes of an export for llamacpp."""


class Server(NamedTuple):
    """launch: the commands that start it with a draft; plain: the one that starts it without."""

    title: str
    plain: str
    launch: tuple[str, ...]


SERVERS: dict[str, Server] = {
    "vllm": Server(
        "vLLM",
        "vllm serve $target",
        (
            "vllm serve $target --speculative-config "
            '\'{"method": "$method", "model": "$draft", "num_speculative_tokens": $proposals}\'',
        ),
    ),
    "sglang": Server(
        "SGLang",
        "python -m sglang.launch_server --model-path $target",
        (
            "python -m sglang.launch_server --model-path $target --speculative-algorithm $METHOD "
            "--speculative-draft-model-path $draft --speculative-num-steps $steps --speculative-eagle-topk 1 "
            "--speculative-num-draft-tokens $window",
        ),
    ),
    "llamacpp": Server(
        "llama.cpp",
        "llama-server -m $served --jinja",
        (
            "python convert_hf_to_gguf.py $target --outfile $served",
            "python convert_hf_to_gguf.py $draft --target-model-dir $target --outfile $file",
            "llama-server -m $served -md $file --spec-type draft-$method "
            "--spec-draft-n-max $proposals --spec-draft-p-min 0 --jinja",
        ),
    ),
}


class Served(NamedTuple):
    """What servers call a kind of draft; architecture: the one that they register."""

    architecture: str
    model_type: str
    method: str


SERVED_AS: dict[str, Served] = {
    "eagle3": Served("LlamaForCausalLMEagle3", "llama", "eagle3"),
    "eagle3, q/k norms": Served("Eagle3Qwen3ForCausalLM", "qwen3", "eagle3"),
    "dflash, fill-in": Served("DFlashDraftModel", "qwen3", "dflash"),
    "dspark": Served("Qwen3DSparkModel", "qwen3", "dspark"),
}


def served_as(spec: DraftSpec) -> Served:
    """What servers call this draft."""
    return SERVED_AS[ALGORITHMS[spec.algorithm].served(spec)]


class Facts(NamedTuple):
    """What a limit depends on. own: whether the draft has an embedding, or a whole head, that may not be the
    target's.
    target: the target it was trained for, if one was given."""

    spec: DraftSpec
    own: bool
    target: Target | None

    @property
    def eagle(self) -> bool:
        return served_as(self.spec).method == "eagle3"


class Limit(NamedTuple):
    """A kind of draft that some servers (names separated by blanks) cannot run: the condition, the reason,
    and what to do instead."""

    when: Callable[[Facts], bool]
    why: str
    instead: str
    servers: str = " ".join(SERVERS)


LIMITS: tuple[Limit, ...] = (
    Limit(
        lambda f: f.spec.family != "qwen3",
        "its layers are Gemma-4-shaped: SGLang has no such draft, llama.cpp refuses a soft-capped head, and "
        "vLLM's loader for them was not checked",
        "export with --to deepspec, the released layout (vLLM knows its architecture, Gemma4DSparkModel)",
    ),
    Limit(
        lambda f: f.spec.family == "qwen3" and f.spec.softcap is not None,
        "the target soft-caps its logits, and the draft in the server would not",
        "run this draft with `deepspec generate`",
    ),
    Limit(
        lambda f: f.spec.family == "qwen3" and f.target is not None and f.target.embedding.scale != 1.0,
        "the target scales its embedding by a factor, and the draft in the server would not",
        "run this draft with `deepspec generate`",
    ),
    Limit(
        lambda f: f.spec.family == "qwen3" and f.target is not None and f.target.head.scale != 1.0,
        "the target scales its logits by a factor, and the draft in the server would not",
        "run this draft with `deepspec generate`",
    ),
    Limit(
        lambda f: f.spec.family == "qwen3" and f.spec.shape.activation != "silu",
        "its MLP is not gated by SiLU, and the server supports no other activation in a draft",
        "train a new draft with `deepspec train`: it uses SiLU for every target but Gemma-4",
    ),
    Limit(
        lambda f: f.spec.shape.attention_bias,
        "its attention has biases, which the server's loader drops silently",
        "train a new draft with `deepspec train`: it has no biases for any target but Gemma-4",
    ),
    Limit(
        lambda f: f.spec.family == "qwen3" and f.spec.shape.rope.kind != "default",
        "its rotary positions are not of the default kind",
        "train a new draft with `deepspec train`: it uses the default kind for every target but Gemma-4",
    ),
    Limit(
        lambda f: f.spec.target_layer_ids[0] < 1,
        "it reads the embedding or layer 0, and the two ways of numbering layers disagree about those",
        "train with draft.target_layer_ids that start at 1 or later",
    ),
    Limit(
        lambda f: not f.eagle and not f.spec.shape.qk_norm,
        "its queries and keys have no per-head norms, and the server expects them in block drafts",
        "train with draft.qk_norm=true",
    ),
    Limit(
        lambda f: f.eagle and f.spec.shape.qk_norm,
        "its queries and keys have per-head norms, and the server does not support them in Eagle-3",
        "export with --to vllm (Eagle3Qwen3ForCausalLM), or train with draft.qk_norm=false "
        "(recipe pocket-eagle3-portable)",
        "sglang llamacpp",
    ),
    Limit(
        lambda f: f.eagle and len(f.spec.target_layer_ids) != 3,
        "it does not read exactly three feature layers, and llama.cpp's Eagle-3 needs three",
        "train with draft.feature_layers=3 (recipe eagle3/small), or export with --to vllm or sglang",
        "llamacpp",
    ),
    Limit(
        lambda f: f.spec.norm_before_residual,
        "its residual is taken after a norm (norm_before_residual), which SGLang does not support",
        "export with --to vllm or llamacpp",
        "sglang",
    ),
    Limit(
        lambda f: f.spec.norm_output,
        "its hidden state is fed back after a norm (norm_output), which llama.cpp does not support",
        "export with --to vllm or sglang",
        "llamacpp",
    ),
    Limit(
        lambda f: f.spec.markov_rank > 0 and f.spec.markov_head != "vanilla",
        "its sequential head is gated or rnn, and the server supports only vanilla",
        "export with --to sglang, or train with draft.markov_head=vanilla",
        "vllm llamacpp",
    ),
    Limit(
        lambda f: f.own,
        "it has its own embedding and head, and the server would use the target's",
        "add --target, so that copies equal to the target's are left out, or export with --to vllm",
        "sglang llamacpp",
    ),
    Limit(
        lambda f: not f.eagle and f.spec.draft_vocab_size is not None,
        "its vocabulary is reduced, and SGLang ignores that in DFlash and DSpark drafts",
        "export with --to vllm",
        "sglang",
    ),
    Limit(
        lambda f: served_as(f.spec).method == "dflash" and f.spec.draft_vocab_size is not None,
        "its vocabulary is reduced, which llama.cpp does not know of DFlash in the older alignment",
        "export with --to vllm",
        "llamacpp",
    ),
    Limit(
        lambda f: not f.eagle and f.target is not None and f.target.spec.model_type == "qwen2",
        "SGLang cannot capture the features of a Qwen2 target for DFlash and DSpark",
        "export with --to vllm, or train an Eagle-3 draft",
        "sglang",
    ),
)


def refuse(to: str, facts: Facts) -> None:
    """Raise UserError with every reason why a server cannot run a draft, if there are any."""
    met = [limit for limit in LIMITS if to in limit.servers.split() and limit.when(facts)]
    if met:
        raise UserError(
            f"{SERVERS[to].title} cannot run this draft:\n" + "\n".join(f"  - {limit.why}" for limit in met),
            next_step="; ".join(dict.fromkeys(limit.instead for limit in met)),
        )


def launch_commands(
    to: str,
    spec: DraftSpec,
    target: str,
    draft: Path,
    served: Path | None = None,
    proposals: int | None = None,
) -> list[str]:
    """The commands that serve an exported draft with its target.

    served: the target's GGUF file, if there is one already; llama.cpp needs it. proposals: of each round that
    are verified, if not all: 0 serves the target alone, and a block draft in SGLang verifies all or none.
    """
    if to == GGUF:
        convert, _, start = launch_commands("llamacpp", spec, target, draft, served, proposals)
        return [start] if served else [convert, start]
    method = served_as(spec).method
    count = spec.proposals if proposals is None else proposals
    # vLLM takes the draft inside quoted JSON; for the others it is a separate word.
    inside = json.dumps(str(draft))[1:-1].replace("'", "'\\''")
    words = {
        "target": shlex.quote(target),
        "draft": inside if to == "vllm" else shlex.quote(str(draft)),
        "served": shlex.quote(str(served or "target.gguf")),
        "file": shlex.quote(str(draft) if draft.suffix == ".gguf" else "draft.gguf"),
        "method": method,
        "METHOD": method.upper(),
        "proposals": count,
        # SGLang drafts a block in one step, and it counts the anchor as one of the tokens that it verifies.
        "steps": count if method == "eagle3" else 1,
        "window": {"dflash": spec.block, "dspark": spec.block + 1, "eagle3": count + 1}[method],
    }
    lines = SERVERS[to].launch if count else (SERVERS[to].plain,)
    return [Template(line).substitute(words) for line in lines]
