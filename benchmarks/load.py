"""Every policy under load on the real engine, next to the best fixed length, and the simulator next to it.

    OMP_NUM_THREADS=1 python benchmarks/load.py --out load.json --turns 8

Users keep one request each in flight, 1 to 64 of them. In every turn all policies serve the same requests,
each by a decoder of its own; the decoders take turns every 50 ms, so that a machine whose speed drifts slows
them alike. Only the time in which all users have a request is counted, in processor seconds of this process.
A policy's ratio to another is that of its tokens per second within a turn; the figure is the median over
turns. Step costs are profiled first, and now and then again. Each turn is kept as it ends: the same command
continues after a kill.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any, cast

import torch

from deepspec.checkpoints.draft import load_draft
from deepspec.data.identity import row_seed
from deepspec.decode.engine import Decoder, Request
from deepspec.drafts.base import NeuralDraft
from deepspec.files import ResumableLog, write_json, write_text
from deepspec.maths.verify import Sampling
from deepspec.measure import profile
from deepspec.measure.evaluate import fingerprint, load_prompts, partial_path
from deepspec.measure.profile import Grid, identity_of, sweep, table_of
from deepspec.measure.rows import Prompt
from deepspec.pocket import prompts_path
from deepspec.report.charts import write_lines
from deepspec.schedule.named import policy_of
from deepspec.schedule.policies import NONE, Policy
from deepspec.schedule.simulate import Arrivals, Simulator, simulated
from deepspec.schedule.traces import read_traces
from deepspec.targets import Target
from deepspec.this_machine import this_machine

SERVED = {1: 6, 2: 8, 4: 8, 8: 16, 16: 24, 32: 32, 64: 48}
"""Users, and the requests that are served in one turn after every user has one."""
CONTEXTS = (48, 128)
GOAL = 0.98
"""The least share of the best fixed length's throughput that `auto` has to reach at every load."""
PLAIN = "plain"
"""A decoder that knows of no draft, next to the policy that uses none."""
LONGEST = 256
"""Tokens that a prompt and its answer may fill."""
WARM = 24
"""Users of the loop in which `auto` learns before the first turn, and as many requests more."""
SLICE = 0.05
"""Processor seconds after which the next policy's decoder has its turn."""
RARE, EVERY = ("fixed:1", "fixed:2", "fixed:3", "threshold:0.5", "early-stop", "budget", PLAIN), 4
"""Policies that are measured in every fourth turn only: those that are far from the best, or a check."""


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


class Shifted:
    """A target or a draft of which a decoder has slots of its own, from `first` on."""

    def __init__(self, inner: Any, first: int) -> None:
        self._inner, self._first = inner, first

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in ("open", "free", "length", "rollback", "wipe", "step", "observe", "propose"):
            return found

        def shifted(slots: Any, *given: Any) -> Any:
            first = self._first
            return found(slots + first if isinstance(slots, int) else [s + first for s in slots], *given)

        return shifted


@dataclass(eq=False)
class Run:
    """A policy's decoder in the middle of its work, and what it took while all users had a request."""

    decoder: Decoder
    watched: Counted | None
    tokens: int = 0
    seconds: float = 0.0

    def slice(self) -> None:
        """Some steps, for about `SLICE` seconds."""
        began, now = process_time(), 0.0
        while self.decoder.waiting and now < SLICE:
            self.tokens += sum(len(event.tokens) for event in self.decoder.step())
            now = process_time() - began
        self.seconds += now

    def figures(self) -> dict[str, float]:
        found = {"tokens": self.tokens, "seconds": self.seconds}
        if self.watched is None:
            return found
        counts = {"rows": self.watched.rows, "verified": self.watched.verified}
        return {**found, **counts, "deciding": self.watched.seconds}


def closed_loops(
    target: Target,
    draft: NeuralDraft,
    policies: Mapping[str, Policy | None],
    requests: list[Request],
    users: int,
) -> dict[str, dict[str, float]]:
    """What every policy took for the same requests. Their decoders take turns, a few steps each."""
    # Room for all positions at once: to make it later would be charged to whoever comes first.
    target.open(0)
    draft.open(0)
    ids = [list(range(LONGEST))]
    draft.observe([0], target.step([0], ids, draft.feature_layers).features, ids, ids)
    draft.free(0)
    target.free(0)
    runs: dict[str, Run] = {}
    for i, (name, policy) in enumerate(policies.items()):
        watched = None if policy in (None, NONE) else Counted(policy)
        parts = Shifted(target, i * users), None if policy is None else Shifted(draft, i * users)
        decoder = Decoder(*cast(Any, parts), max_rows=users, policy=watched or policy)
        for request in requests:
            decoder.submit(request)
        while len(decoder.waiting) > len(requests) - users:
            decoder.step()
        if watched is not None:
            watched.rows, watched.verified, watched.seconds = 0, 0, 0.0
        runs[name] = Run(decoder, watched)
    order = random.Random(0)
    while going := [run for run in runs.values() if run.decoder.waiting]:
        for run in order.sample(going, len(going)):
            run.slice()
    for run in runs.values():
        for row in list(run.decoder.rows):
            run.decoder.cancel(row.answer.key)
    target.release()
    draft.release()
    return {name: run.figures() for name, run in runs.items()}


def names_of(block: int) -> list[str]:
    fixed = [f"fixed:{k}" for k in range(1, block + 1)]
    return [PLAIN, "none", *fixed, "threshold:0.5", "early-stop", "budget", "auto"]


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of the record: sweeps of the profile, and for each turn and load what every policy did."""
    target = Target.from_pretrained(given.target, device="cpu")
    draft = load_draft(given.draft, target)
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
        # A server has been running for a while: what auto learns first is not measured.
        requests = requests_of(target, prompts, WARM, -1, given)
        closed_loops(target, draft, {"auto": policies["auto"]}, requests, WARM)
        done = {(line["turn"], line["users"]) for line in lines if "turn" in line}
        for turn in range(given.first, given.first + given.turns):
            asked = [name for name in names if turn % EVERY == 0 or name not in RARE]
            for users in (n for n in given.users if (turn, n) not in done):
                requests = requests_of(target, prompts, users, turn, given)
                mixed = random.Random(turn).sample(asked, len(asked))
                chosen = {name: policies.get(name) for name in mixed}
                found = closed_loops(target, draft, chosen, requests, users)
                keep({"turn": turn, "users": users, "found": found})
            if turn % EVERY == 0:
                profiled(sum("sweep" in line for line in lines) + 1)
            print(f"turn {turn}", file=sys.stderr, flush=True)
        return lines


Rates = dict[int, dict[str, dict[int, float]]]
"""Tokens per second by users, policy and turn."""


def rates_of(lines: list[dict[str, Any]]) -> Rates:
    found: Rates = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        for name, one in line.get("found", {}).items():
            found[line["users"]][name][line["turn"]] = one["tokens"] / one["seconds"]
    return {users: dict(found[users]) for users in sorted(found)}


def ratio(one: dict[int, float], other: dict[int, float]) -> float:
    """The median over the turns that have both."""
    return statistics.median(one[turn] / other[turn] for turn in one.keys() & other.keys())


def best_fixed(rates: dict[str, dict[int, float]]) -> str:
    """The fixed length, none included, that is nowhere behind another one by the median of its ratios."""
    fixed = [name for name in rates if name == "none" or name.startswith("fixed:")]
    return max(fixed, key=lambda name: min(ratio(rates[name], rates[other]) for other in fixed))


def facts_of(lines: list[dict[str, Any]], users: int, name: str) -> dict[str, float]:
    """What a policy did in all turns: tokens/s, proposals verified per row and round, time spent deciding."""
    found = [line["found"][name] for line in lines if line.get("users") == users and name in line["found"]]
    total = {
        key: sum(one.get(key, 0) for one in found)
        for key in ("tokens", "seconds", "rows", "verified", "deciding")
    }
    return {
        "tokens_per_s": total["tokens"] / total["seconds"],
        "verified": total["verified"] / max(total["rows"], 1),
        "deciding": total["deciding"] / total["seconds"],
    }


def report(given: argparse.Namespace, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The table of every load, and the simulator's figures next to those measured."""
    target = Target.from_pretrained(given.target)
    draft = load_draft(given.draft, target)
    grid = Grid(rows=tuple(SERVED), contexts=CONTEXTS).fitted(target, draft.max_proposals)
    costs = table_of(
        [line["sweep"] for line in lines if "sweep" in line], grid, identity_of(target, draft), None
    )
    simulator = None
    if given.traces is not None:
        simulator = Simulator(costs, read_traces(given.traces, draft=fingerprint(draft)))
    rates, loads, policies = rates_of(lines), [], dict[str, Policy]()
    for users, each in rates.items():
        best = best_fixed(each)
        rows = {}
        for name, speeds in each.items():
            rows[name] = {
                "ratio": ratio(speeds, each[best]),
                "turns": len(speeds),
                **facts_of(lines, users, name),
            }
            if simulator is not None and name != PLAIN:
                made = policies.setdefault(name, simulated(name, costs, draft.max_proposals))
                requests = max(given.simulated, 8 * users)
                rows[name]["simulated"] = simulator.serve(made, Arrivals(users=users), requests).tokens_per_s
        loads.append({"users": users, "best": best, "policies": rows})
    return {"loads": loads, "costs": costs.record()}


def page_of(found: dict[str, Any]) -> str:
    lines = []
    for load in found["loads"]:
        lines += [f"{load['users']} users, best fixed: {load['best']}", ""]
        lines += ["| policy | tokens/s | × best fixed | turns | verified | deciding | simulated / measured |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for name, row in sorted(load["policies"].items(), key=lambda pair: -pair[1]["ratio"]):
            near = f"{row['simulated'] / row['tokens_per_s']:.2f}" if "simulated" in row else "–"
            lines += [
                f"| {name} | {row['tokens_per_s']:.0f} | {row['ratio']:.3f} | {row['turns']} "
                f"| {row['verified']:.2f} | {row['deciding']:.1%} | {near} |"
            ]
        lines += [""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="pocket")
    parser.add_argument("--draft", default="pocket-dspark")
    parser.add_argument("--prompts", default="pocket:test")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--users", type=int, nargs="+", default=list(SERVED))
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--first", type=int, default=0, help="the first turn's number")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--traces", type=Path, help="of `deepspec calibrate --traces`, to simulate the same")
    parser.add_argument("--simulated", type=int, default=200, help="requests to simulate")
    parser.add_argument("--out", type=Path, default=Path("load.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = report(given, measure(given))
    write_json(given.out, found)
    names = ["none", "fixed:3", "fixed:5", "fixed:7", "early-stop", "budget", "auto"]
    ratios = {n: [load["policies"][n]["ratio"] for load in found["loads"]] for n in names}
    users = [str(load["users"]) for load in found["loads"]]
    write_lines(given.out.with_suffix(".svg"), "Throughput", "users", "× best fixed length", users, ratios)
    page = page_of(found)
    write_text(given.out.with_suffix(".md"), page)
    print(page)
    return int(min(load["policies"]["auto"]["ratio"] for load in found["loads"]) < GOAL)


if __name__ == "__main__":
    sys.exit(main())
