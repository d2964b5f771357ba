"""`deepspec recommend` against the engine: tokens per second predicted and measured, at 1, 8 and 32 users.

    python benchmarks/recommend.py --rounds 5 --out recommend.md

Step costs are profiled here, acceptance and lengths are taken from every second test prompt, and the speed
of each choice is measured on the others. Sweeps of the profile and measurements take turns, so that a machine
whose speed drifts slows both alike; a choice's figure is the ratio of its tokens to its seconds over all
rounds. On a processor seconds are those that this process got, so that a busy machine disturbs less. Exits 1
if a prediction is more than a tenth away.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from itertools import cycle, islice
from pathlib import Path

from deepspec.checkpoints.draft import load_draft
from deepspec.cost.acceptance import from_results
from deepspec.cost.recommend import NONE, Choice, Load, choices
from deepspec.data.identity import row_seed
from deepspec.decode.engine import Decoder, Request
from deepspec.drafts.base import NeuralDraft
from deepspec.files import write_text
from deepspec.maths.verify import Sampling
from deepspec.measure import profile
from deepspec.measure.evaluate import evaluate_drafts, load_prompts
from deepspec.measure.profile import Grid, identity_of, sweep, table_of
from deepspec.measure.rows import Prompt
from deepspec.pocket import prompts_path
from deepspec.schedule.policies import Fixed
from deepspec.targets import Target
from deepspec.this_machine import this_machine

CLOSE = 0.1
"""The most that a prediction may be away from what is measured, as a share of it."""


def closed_loop(
    target: Target, draft: NeuralDraft | None, length: int, requests: list[Request], users: int
) -> tuple[int, float]:
    """(tokens, seconds) while all users have a request in flight."""
    whole = draft is None or length == draft.max_proposals
    decoder = Decoder(target, draft, max_rows=users, policy=None if whole else Fixed(length))
    for request in requests:
        decoder.submit(request)
    while len(decoder.waiting) > len(requests) - users:
        decoder.step()
    tokens, began, spent = 0, profile.clock(target.device), 0.0
    while not decoder.idle:
        counted = bool(decoder.waiting) or users == 1
        new = sum(len(event.tokens) for event in decoder.step())
        if counted:
            tokens, spent = tokens + new, profile.clock(target.device) - began
    return tokens, spent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="pocket")
    parser.add_argument("--draft", default="pocket-dspark")
    parser.add_argument("--prompts", default="pocket:test")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    target, sampling = Target.from_pretrained(given.target), Sampling(given.temperature)
    draft = load_draft(given.draft, target)
    if target.device.type == "cpu":
        profile.clock = lambda device: time.process_time()
    prompts = load_prompts(prompts_path(given.prompts), target)
    known, held_out = prompts[::2], prompts[1::2]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "eval.json"
        found = evaluate_drafts(
            target, {draft.name: draft}, known, sampling, batch=8, baselines=False,
            max_new_tokens=given.max_new_tokens, out=results,
        )  # fmt: skip
        acceptance = from_results(results, draft.name, block=draft.max_proposals)
    plain = next(row for row in found["rows"] if row["method"] == "plain")
    prompt = sum(len(p.ids) for p in known) / len(known)
    answer = plain["overall"]["tokens"] / len(known)
    grid = Grid(rows=tuple(sorted({1, 2, 4, 8, 16, 32, *given.users}))).fitted(target, draft.max_proposals)
    sweeps = []
    lengths = (0, draft.max_proposals // 2, draft.max_proposals)
    tokens: dict[tuple[int, int], float] = defaultdict(float)
    seconds: dict[tuple[int, int], float] = defaultdict(float)
    rest = cycle(held_out)
    for number in range(given.rounds):
        sweeps.append(sweep(target, draft, grid, sampling, number))
        for users in given.users:
            # Many for each user: those in flight when none waits, mostly long answers, are left out.
            some = list(islice(rest, 6 * users + 4))
            for length in lengths:
                requests = requests_of(target, some, sampling, given.max_new_tokens, number)
                using = draft if length else None
                new, spent = closed_loop(target, using, length, requests, users)
                tokens[users, length] += new
                seconds[users, length] += spent
        print(f"round {number + 1} of {given.rounds}", file=sys.stderr, flush=True)
    costs = table_of(sweeps, grid, identity_of(target, draft), None)
    lines, worst, regret = [], 0.0, 0.0
    for users in given.users:
        ranked = choices(costs, acceptance, Load(users, prompt, answer))
        measured = {length: tokens[users, length] / seconds[users, length] for length in lengths}
        tried = [choice for choice in ranked if length_of(choice) in measured]
        for choice in sorted(tried, key=length_of):
            speed = measured[length_of(choice)]
            worst = max(worst, abs(choice.tokens_per_s / speed - 1))
            best = " (recommended)" if choice is tried[0] else ""
            lines.append(
                f"| {users} | {choice.name}{best} "
                f"| {choice.tokens_per_s:.1f} [{choice.low:.1f}, {choice.high:.1f}] | {speed:.1f} "
                f"| {choice.tokens_per_s / speed:.3f} |"
            )
        regret = max(regret, 1 - measured[length_of(tried[0])] / max(measured.values()))
    page = "\n".join(
        [
            f"{given.draft} on {given.target}, T={given.temperature:g}, {this_machine()}; acceptance: "
            f"{acceptance.source} (τ {acceptance.tau:.2f}), {len(held_out)} other prompts measured; "
            f"prompts of {prompt:.0f} tokens, answers of {answer:.0f}; {given.rounds} rounds.",
            "",
            "| users | choice | predicted tokens/s | measured | predicted/measured |",
            "|---|---|---|---|---|",
            *lines,
            "",
            f"Largest error {worst:.1%}; the recommended choice is at most {regret:.1%} slower than the best "
            "one measured.",
        ]
    )
    print(page)
    if given.out is not None:
        write_text(given.out, page + "\n")
    return int(worst > CLOSE)


def length_of(choice: Choice) -> int:
    return 0 if choice.name == NONE else int(choice.name.partition(":")[2])


def requests_of(
    target: Target, prompts: list[Prompt], sampling: Sampling, budget: int, number: int
) -> list[Request]:
    """A request for each prompt; the same prompt may come more than once."""
    stops = target.stop_token_ids
    return [
        Request(p.ids, budget, row_seed(number, f"{p.id}/{i}"), f"{p.id}/{i}", sampling, stops)
        for i, p in enumerate(prompts)
    ]


if __name__ == "__main__":
    sys.exit(main())
