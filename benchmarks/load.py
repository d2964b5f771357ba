"""Every policy under load on the real engine, next to the best fixed length, and the simulator next to it.

    OMP_NUM_THREADS=1 python benchmarks/load.py --out load.json --turns 8

Users keep one request each in flight, 1 to 64 of them. In every turn all policies serve the same requests,
one after another in an order of its own, and only the time in which all users have a request is counted. A
policy's ratio to another is that of its tokens per second within a turn; the figure is the median over turns.
On a processor seconds are those that this process got. Step costs are profiled first, on prompts that are not
served. Each turn is kept as it ends: the same command continues after a kill.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from time import process_time
from typing import Any

import torch

from deepspec.checkpoints.draft import load_draft
from deepspec.data.identity import row_seed
from deepspec.decode.engine import Decoder, Request
from deepspec.drafts.base import NeuralDraft
from deepspec.files import ResumableLog
from deepspec.maths.verify import Sampling
from deepspec.measure import profile
from deepspec.measure.evaluate import fingerprint, load_prompts, partial_path
from deepspec.measure.profile import Grid, identity_of, sweep, table_of
from deepspec.measure.rows import Prompt
from deepspec.pocket import prompts_path
from deepspec.schedule.named import policy_of
from deepspec.schedule.policies import NONE, Policy
from deepspec.targets import Target
from deepspec.this_machine import this_machine

SERVED = {1: 6, 2: 8, 4: 8, 8: 16, 16: 24, 32: 32, 64: 48}
"""Users, and the requests that are served in one turn after every user has one."""
CONTEXTS = (48, 128)
PLAIN = "plain"
"""A decoder that knows of no draft, next to the policy that uses none."""
RARE, EVERY = ("fixed:1", "fixed:2", "fixed:3", "threshold:0.5", PLAIN), 3
"""Policies that are far from the best, or only a check: they are measured in every third turn."""


class Counted(Policy):
    """A policy, and how many rows it saw and how many proposals it verified."""

    def __init__(self, inner: Policy) -> None:
        self.inner, self.rows, self.verified, self.seconds = inner, 0, 0, 0.0

    def proposes(self, load: Any) -> bool:
        began = process_time()
        answer = self.inner.proposes(load)
        self.seconds += process_time() - began
        return answer

    def lengths(self, confidences: Any, load: Any) -> Any:
        began = process_time()
        found = self.inner.lengths(confidences, load)
        self.seconds += process_time() - began
        return found

    def learn(self, proposed: Any, accepted: Any) -> None:
        began = process_time()
        self.inner.learn(proposed, accepted)
        self.seconds += process_time() - began
        self.rows += len(proposed)
        self.verified += int(proposed.sum())


def requests_of(target: Target, prompts: list[Prompt], users: int, turn: int, given: Any) -> list[Request]:
    """The requests of one turn, the same for each policy; the first of each user ends somewhere on its way,
    so that users are not in step."""
    order = random.Random(1000 * users + turn)
    chosen = order.choices(prompts, k=users + SERVED.get(users, users))
    most = given.max_new_tokens
    return [
        Request(
            p.ids,
            order.randint(1, most) if i < users else most,
            row_seed(turn, f"{p.id}/{i}"),
            f"{p.id}/{i}",
            Sampling(given.temperature),
            target.stop_token_ids,
        )
        for i, p in enumerate(chosen)
    ]


def closed_loop(
    target: Target, draft: NeuralDraft | None, policy: Policy | None, requests: list[Request], users: int
) -> dict[str, float]:
    """Tokens, seconds and rounds' rows while all users have a request in flight."""
    watched = None if policy in (None, NONE) else Counted(policy)
    decoder = Decoder(target, draft, max_rows=users, policy=watched or policy)
    for request in requests:
        decoder.submit(request)
    while len(decoder.waiting) > len(requests) - users:
        decoder.step()
    if watched is not None:
        watched.rows = watched.verified = 0
        watched.seconds = 0.0
    tokens, began = 0, process_time()
    while decoder.waiting:
        tokens += sum(len(event.tokens) for event in decoder.step())
    spent = process_time() - began
    for row in list(decoder.rows):
        decoder.cancel(row.answer.key)
    counts = (
        {}
        if watched is None
        else {"rows": watched.rows, "verified": watched.verified, "deciding": watched.seconds}
    )
    return {"tokens": tokens, "seconds": spent, **counts}


def names_of(block: int) -> list[str]:
    fixed = [f"fixed:{k}" for k in range(1, block + 1)]
    return [PLAIN, "none", *fixed, "threshold:0.5", "early-stop", "budget", "auto"]


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of the record: sweeps of the profile, and for each turn and load what every policy did."""
    target = Target.from_pretrained(given.target)
    draft = load_draft(given.draft, target)
    if target.device.type == "cpu":
        profile.clock = lambda device: process_time()
    prompts = load_prompts(prompts_path(given.prompts), target)[1::2]
    names = names_of(draft.max_proposals)
    grid = Grid(rows=tuple(SERVED), contexts=CONTEXTS).fitted(target, draft.max_proposals)
    facts = {name: getattr(given, name) for name in ("target", "draft", "prompts", "temperature")}
    facts |= {"machine": this_machine(), "draft_hash": fingerprint(draft), "most": given.max_new_tokens}
    with ResumableLog(partial_path(given.out), facts, header=True) as log:
        lines = [line for _, line in log.records()]

        def keep(line: dict[str, Any]) -> None:
            lines.append(line)
            log.write(line)
            log.sync()

        def profiled(sweeps: int) -> list[Any]:
            while len(found := [line["sweep"] for line in lines if "sweep" in line]) < sweeps:
                keep({"sweep": sweep(target, draft, grid, Sampling(given.temperature), len(found))})
            return found

        costs = table_of(profiled(given.sweeps)[: given.sweeps], grid, identity_of(target, draft), None)
        policies = {name: policy_of(name, costs, draft.max_proposals) for name in names if name != PLAIN}
        done = {(line["turn"], line["users"]) for line in lines if "turn" in line}
        for turn in range(given.first, given.first + given.turns):
            asked = [name for name in names if turn % EVERY == 0 or name not in RARE]
            for users in (n for n in SERVED if (turn, n) not in done):
                requests = requests_of(target, prompts, users, turn, given)
                found = {}
                for name in random.Random(turn).sample(asked, len(asked)):
                    using = None if name == PLAIN else draft
                    found[name] = closed_loop(target, using, policies.get(name), requests, users)
                keep({"turn": turn, "users": users, "found": found})
            if turn % EVERY == 0:
                profiled(given.sweeps + turn // EVERY + 1)
            print(f"turn {turn}", file=sys.stderr, flush=True)
        return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="pocket")
    parser.add_argument("--draft", default="pocket-dspark")
    parser.add_argument("--prompts", default="pocket:test")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="the first turn's number")
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("load.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    measure(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
