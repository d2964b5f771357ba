"""Greedy output with every ready-made draft against plain greedy decoding, token for token.

    python benchmarks/lossless.py --prompts 100 --rows 1      alone
    python benchmarks/lossless.py --prompts 100 --rows 16     in ragged batches

Plain decoding always runs one prompt at a time. Exits 1 where a token differs.
"""

from __future__ import annotations

import argparse
import sys

from deepspec.checkpoints.draft import load_draft
from deepspec.decode.engine import Decoder, Request
from deepspec.drafts import ALGORITHMS
from deepspec.drafts.base import Draft
from deepspec.measure.evaluate import load_prompts
from deepspec.pocket import prompts_path
from deepspec.targets import Target


def answers(target: Target, draft: Draft | None, requests: list[Request], rows: int) -> dict[str, list[int]]:
    """Greedy tokens by prompt id."""
    decoder = Decoder(target, draft, max_rows=rows)
    return {g.key: g.token_ids for g in decoder.run(requests)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    target = Target.from_pretrained("pocket", dtype="float32")
    prompts = load_prompts(prompts_path("pocket:test"), target, limit=arguments.prompts)
    stops = target.stop_token_ids
    requests = [Request(p.ids, arguments.max_new_tokens, key=p.id, stop_token_ids=stops) for p in prompts]
    plain = answers(target, None, requests, 1)
    differ = 0
    for algorithm in ALGORITHMS:
        found = answers(target, load_draft(f"pocket-{algorithm}", target), requests, arguments.rows)
        same = sum(found[key] == tokens for key, tokens in plain.items())
        differ += len(plain) - same
        print(f"{algorithm}: {same} of {len(plain)} prompts identical, {arguments.rows} row(s)", flush=True)
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
