"""The training step on a GPU that is not there: time by a card's figures, peak memory, and waits of the host.

    python benchmarks/gpu_trace.py [dspark dflash eagle3] [--length 4096] [--tiny] [--offload] [--json]
    python benchmarks/gpu_trace.py [dspark dflash eagle3] --round 6 [--json]

One sequence at the dimensions of Qwen3-4B (`--tiny`: a target of two layers), a fifth of it prompt, 512
anchors, bfloat16 with float32 masters (`--offload`: in the host's memory). Every kernel is put at the longer
of its bytes by the card's bandwidth and its FLOPs by the card's speed, one after the other, launches free: a
roofline and not a measurement. The floor is the operations that `deepspec plan` counts, attention of the
target as half a square, at the card's speed. No number is computed, and no GPU is needed; g++ is
(`fake_gpu.py`).

`--round` counts the kernels and the waits of a round of decoding.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("src", "benchmarks")]

from fake_gpu import H200, pretend_cuda, traced  # noqa: E402

ALGORITHMS = ("dspark", "dflash", "eagle3")
TINY = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1000,
    "num_hidden_layers": 6,
    "max_position_embeddings": 4096,
}


def make_target(config: dict[str, Any]) -> Any:
    """A bfloat16 target on the device, its weights without numbers."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from deepspec.targets import Target, TargetSpec
    from deepspec.targets.lean import LeanDecoder

    words = {k: v for k, v in config.items() if k != "model_type"}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(Qwen3Config(**words, attn_implementation="sdpa"))
    torch.set_default_dtype(torch.float32)
    target = Target(TargetSpec("traced", config), model)
    # Without numbers there is nothing to compare before its layers are taken.
    lean = LeanDecoder(target.decoder, target._config, target.embedding.weight, target._cache.stores)
    vars(target)["_lean"] = lean
    return target


def make_draft(recipe: Any, target: Any) -> Any:
    import torch

    from deepspec.drafts import ALGORITHMS as ROWS
    from deepspec.train.build import recipe_spec

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        draft = ROWS[recipe.algorithm].build(recipe_spec(recipe, target))
    torch.set_default_dtype(torch.float32)
    draft.bind(target.embedding, target.head, target.head)
    return draft


def counted(recipe: Any, target: Any, length: int, prompt: int, draft: Any) -> tuple[float, dict[str, float]]:
    """(operations of the floor, the planner's bytes of a step) of one sequence."""
    from deepspec.cost import formulas
    from deepspec.cost.dimensions import draft_dimensions, target_dimensions

    own = sum(p.numel() for p in draft.parameters())
    names = target_dimensions(target.spec.config)
    drafts = names | draft_dimensions(draft.spec, own, recipe.precision)
    supervised = length - prompt
    anchors = min(recipe.num_anchors, supervised - 1)
    block = int(drafts["block"])
    taught = recipe.algorithm != "dflash"
    read = dict(names)
    if not taught:  # nothing after the last layer that is read is needed
        share = (max(draft.feature_layers) + 1) / names["layers"]
        read |= {"active": names["active"] * share, "layers": names["layers"] * share}
    rows = anchors * formulas.slots_that_count(supervised, block)
    if not drafts["parallel"]:
        rows = supervised * block
    miss = 1.0  # the share of positions that no slot learns from: anchors are drawn without replacement
    for slot in range(block):
        miss *= max(supervised - 1 - anchors - slot, 0) / (supervised - 1 - slot)
    teachers = supervised * ((1 - miss) if drafts["parallel"] else 1) if taught else 0
    keys = prompt + supervised / 2 if drafts["parallel"] else length / 2
    parts = (
        formulas.forward_flops(read, length, length / 2),
        formulas.draft_flops(drafts, 1, length, keys, anchors),
        formulas.head_flops(drafts, rows, teachers),
    )
    features = length * names["width"] * names["hidden"] * (2 * drafts["feature_layers"] + 1)
    held = {
        "features": features,
        "activations": formulas.activation_bytes(drafts, 1, length, anchors, True).value,
        "loss": formulas.head_bytes(drafts, rows, min(rows, length), True, True).value,
        "weights": names["parameters"] * names["width"],
        "state": own
        * formulas.state_bytes_per_parameter(recipe.precision, recipe.optim.states, recipe.offload_optimizer),
    }
    return sum(map(float, parts)), held


def trace_step(algorithm: str, length: int, tiny: bool, offload: bool) -> dict[str, Any]:
    """A later micro-batch of a step, and the optimiser's: figures by name."""
    import torch

    from deepspec.config import load_recipe
    from deepspec.cost.dimensions import PUBLISHED_TARGETS
    from deepspec.data.tokens import Encoded
    from deepspec.features.batches import online
    from deepspec.maths import fused
    from deepspec.train.optimizer import Optimizer
    from deepspec.train.step import train_step

    config = TINY if tiny else PUBLISHED_TARGETS["Qwen/Qwen3-4B"] | {"max_position_embeddings": 40960}
    anchors = min(512, length // 8)
    words = ["optim.batch_size=1", f"num_anchors={anchors}", f"data.max_length={length}"]
    words += [f"offload_optimizer={str(offload).lower()}"]
    if tiny:
        fused.LEAST = 1  # compiled like wide tensors
        words += ["draft.mask_token_id=3", "draft.target_layer_ids=[0,1,2,3,4]"]
    recipe = load_recipe(f"{algorithm}/qwen3-4b", words)
    prompt = round(0.21 * length)
    row = Encoded([5 + i % 900 for i in range(length)], [0] * prompt + [1] * (length - prompt), "row")
    with traced(H200) as trace:
        target = make_target(config)
        draft = make_draft(recipe, target)
        optimizer = Optimizer(draft, recipe.optim, recipe.offload_optimizer)
        source = phased(trace, online(target, draft.feature_layers))
        found: dict[str, Any] = {"length": length, "anchors": anchors}
        for step in range(2):  # AdamW's moments are there in the second
            for _ in range(2):  # gradients are there in the second
                gc.collect()
                trace.forget()
                train_step(draft, source, [row], recipe, step, measure=False, optimizer=optimizer)
            figures = {
                "waits": sum(trace.waits.values()),
                "kernels": trace.kernels,
                "ms": 1e3 * sum(trace.seconds.values()),
                "TFLOP": sum(trace.flops.values()) / 1e12,
                "GB moved": sum(trace.bytes.values()) / 1e9,
                "parts, ms": {k: 1e3 * v for k, v in sorted(trace.seconds.items())},
            }
            about = {"waits": dict(trace.waits), "lines": trace.lines.most_common(40)}
            trace.phase = "optimizer"
            optimizer.step(0.5)
            figures["waits of the optimiser"] = sum(trace.waits.values()) - figures["waits"]
        held = [(text, size) for text, size in trace.at_peak.most_common(40)]
        flops, planned = counted(recipe, target, length, prompt, draft)
        found |= figures | {
            "floor, ms": 1e3 * flops / H200.narrow,
            "peak, GB": trace.peak / 1e9,
            "planned, GB": sum(planned.values()) / 1e9,
            "planned": planned,
            "about": about | {"held": held},
        }
        del torch
    return found | {"ms/floor": found["ms"] / found["floor, ms"]}


def trace_round(algorithm: str, layers: int) -> dict[str, Any]:
    """One round of four ragged rows, half of them greedy, at the tiny dimensions: kernels and waits."""
    import torch

    from deepspec.config import load_recipe
    from deepspec.decode import engine
    from deepspec.maths.verify import Sampling

    words = ["draft.mask_token_id=3", "draft.target_layer_ids=[0,1,2]"]
    recipe = load_recipe(f"{algorithm}/qwen3-4b", words)
    # A prompt's first token is decided on the host, which would find no numbers.
    engine.defined, engine.first_layer = lambda _: torch.tensor(True), lambda *_: None
    engine.draw = lambda *_: torch.tensor(5)
    with traced(H200) as trace:
        trace.masks = True
        target = make_target(TINY | {"num_hidden_layers": layers})
        draft = make_draft(recipe, target).eval().requires_grad_(False)
        draft.settle()
        decoder = engine.Decoder(target, draft, max_rows=4)
        for row in range(4):
            prompt = list(range(5, 25 + row))
            decoder.submit(engine.Request(prompt, 64, row, sampling=Sampling(float(row % 2))))
        for _ in range(4):
            decoder.step()
        trace.forget()
        decoder.step()
        return {"kernels": trace.kernels, "waits": dict(trace.waits)}


def phased(trace: Any, source: Any) -> Any:
    """The same source; what runs in it and after it is told apart in the account."""

    def read(rows: Any, width: int) -> Any:
        trace.phase = "target"
        batch = source(rows, width)
        trace.phase = "draft"
        return batch

    return read


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("algorithms", nargs="*", default=ALGORITHMS)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--tiny", action="store_true", help="a target of six layers and 1,000 words")
    parser.add_argument("--offload", action="store_true", help="masters and moments in the host's memory")
    parser.add_argument("--lines", type=int, default=0, help="show the dearest lines and largest tensors")
    parser.add_argument("--round", type=int, metavar="LAYERS", help="a round of decoding over so many layers")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    cache = Path(os.environ.get("DEEPSPEC_CACHE") or Path.home() / ".cache/deepspec")
    pretend_cuda(cache / "trace")
    report = {}
    for algorithm in chosen.algorithms if chosen.round else ():
        report[algorithm] = found = trace_round(algorithm, chosen.round)
        if not chosen.json:
            print(f"{algorithm:7s} {found['kernels']} kernels, {sum(found['waits'].values())} waits")
            for what, count in found["waits"].items():
                print(f"        waits {count}: {what}")
    for algorithm in () if chosen.round else chosen.algorithms:
        report[algorithm] = found = trace_step(algorithm, chosen.length, chosen.tiny, chosen.offload)
        if chosen.json:
            continue
        print(
            f"{algorithm:7s} {found['ms']:8.2f} ms, floor {found['floor, ms']:.2f} "
            f"({found['ms/floor']:.2f} of it); "
            f"peak {found['peak, GB']:.2f} GB (planned {found['planned, GB']:.2f}); "
            f"{found['waits']} waits, {found['kernels']} kernels; "
            f"{found['TFLOP']:.2f} TFLOP, {found['GB moved']:.1f} GB moved"
        )
        print("        " + "; ".join(f"{k} {v:.2f}" for k, v in found["parts, ms"].items()))
        for what, count in found["about"]["waits"].items():
            print(f"        waits {count}: {what}")
        for what, took in found["about"]["lines"][: chosen.lines]:
            print(f"        {1e3 * took:9.3f} ms  {what}")
        for what, size in found["about"]["held"][: chosen.lines]:
            print(f"        {size / 1e9:9.4f} GB  {what}")
    if chosen.json:
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
