"""Peak memory and time of head and losses: deepspec's chunked path against the plain sequence of operations.

    python benchmarks/head_loss_memory.py [--json]

Sizes are those of one DSpark batch of 256 blocks of 7 on a Qwen3 vocabulary: N = 1,792 rows, V = 151,936,
d = 512, Markov rank r = 256, terms ce and l1, float32, forward and backward, one thread. Every measurement
has a process to itself: peak resident memory, less what was resident once weights and inputs had been made
and touched. Time is CPU time, which other work on the machine disturbs less than the clock.

Two cases. With a trainable Markov head both sides also form the gradient of W2, V x r x 4 bytes = 156 MB,
while the plain path peaks earlier, on its logits. The rest of our figure is one chunk's logits of draft and
teacher, however many rows there are. With a frozen one (its bias still added) nobody forms it.
Exit status 1 if ours takes more than a quarter of the plain path's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MEGABYTE = 10**6
CE, L1 = 0.1, 0.9
PATHS = ("plain", "deepspec")
CASES = ("trainable", "frozen")
LIMIT = 1 / 4


def main() -> None:
    arguments = parse()
    if arguments.path is not None:
        print(json.dumps(measure(arguments)))
        return
    report = [compare(arguments, case) for case in CASES]
    if arguments.json:
        print(json.dumps({"sizes": sizes(arguments), "threads": 1, "cases": report}, indent=2))
    else:
        show(arguments, report)
    sys.exit(any(entry["memory_ratio"] > LIMIT for entry in report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Peak memory and time of head and losses.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rows", type=int, default=1792)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="runs in a process; the fastest is reported")
    parser.add_argument("--path", choices=PATHS, help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=CASES, default=CASES[0], help=argparse.SUPPRESS)
    return parser.parse_args()


def sizes(arguments: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(arguments, name) for name in ("rows", "vocab", "width", "rank")}


def compare(arguments: argparse.Namespace, case: str) -> dict[str, Any]:
    """Both paths in processes of their own, and what they say about each other."""
    found = {path: in_own_process(arguments, path, case) for path in PATHS}
    plain, ours = found["plain"], found["deepspec"]
    for name in ("loss", "gradient"):
        if abs(plain[name] - ours[name]) > 1e-3 * abs(plain[name]):
            sys.exit(f"the two paths disagree on the {name}: {plain[name]} and {ours[name]}")
    return {
        "markov_head": case,
        **found,
        "memory_ratio": ours["peak_bytes"] / plain["peak_bytes"],
        "time_ratio": ours["cpu_seconds"] / plain["cpu_seconds"],
    }


def in_own_process(arguments: argparse.Namespace, path: str, case: str) -> dict[str, Any]:
    options = [f"--{name}={value}" for name, value in sizes(arguments).items()]
    source = str(Path(__file__).resolve().parents[1] / "src")
    search = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [
            sys.executable,
            __file__,
            f"--path={path}",
            f"--case={case}",
            f"--repeats={arguments.repeats}",
            *options,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """In the child: make the inputs, run once for the peak, then again for the time."""
    import torch

    torch.set_num_threads(1)
    inputs = make_inputs(arguments)
    run = {"plain": plain, "deepspec": chunked}[arguments.path]
    before = peak_bytes()
    if (now := resident_bytes()) is not None and before - now > 8 * MEGABYTE:
        sys.exit(f"peak {before} is above the resident {now} before the start: it would hide part of the run")
    seconds = []
    for attempt in range(max(1, arguments.repeats)):
        start = time.process_time()
        loss = run(inputs)
        seconds.append(time.process_time() - start)
        if attempt == 0:
            peak = peak_bytes() - before
            gradient = sum(
                float(t.grad.norm())
                for t in (inputs["hidden"], inputs["z"], inputs["w2"])
                if t.grad is not None
            )
        for name in ("hidden", "z", "w2"):
            inputs[name].grad = None
    return {"peak_bytes": peak, "cpu_seconds": min(seconds), "loss": loss, "gradient": gradient}


def make_inputs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Drawn, and thereby touched: every page of them is resident before the measurement starts."""
    import torch

    rows, vocab, width, rank = sizes(arguments).values()
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.empty(*shape).normal_(0.0, std, generator=generator)

    return {
        "weight": new(vocab, width, std=3 * width**-0.5),
        "hidden": new(rows, width).requires_grad_(),
        "teacher_hidden": new(rows, width),
        "z": new(rows, rank).requires_grad_(),
        "w2": new(vocab, rank, std=rank**-0.5).requires_grad_(arguments.case == "trainable"),
        "labels": torch.randint(vocab, (rows,), generator=generator),
        "weights": torch.rand(rows, generator=generator),
    }


def plain(inputs: dict[str, Any]) -> float:
    """As one would write it, relying on autograd; the teacher without a graph."""
    import torch
    import torch.nn.functional as F

    with torch.no_grad():
        teacher = torch.softmax(F.linear(inputs["teacher_hidden"], inputs["weight"]), dim=-1)
    logits = F.linear(inputs["hidden"], inputs["weight"]) + F.linear(inputs["z"], inputs["w2"])
    ce = F.cross_entropy(logits, inputs["labels"], reduction="none")
    l1 = (torch.softmax(logits, dim=-1) - teacher).abs().sum(dim=-1)
    loss = (inputs["weights"] * (CE * ce + L1 * l1)).sum()
    accept = 1.0 - 0.5 * l1.detach()
    correct = logits.argmax(dim=-1) == teacher.argmax(dim=-1)
    assert accept.shape == correct.shape
    loss.backward()
    return float(loss.detach())


def chunked(inputs: dict[str, Any]) -> float:
    """The same figures and gradients through `deepspec.maths.losses.head_loss`, with its default chunk."""
    from deepspec.maths.head import Head
    from deepspec.maths.losses import head_loss

    head = Head(inputs["weight"])
    loss = head_loss(
        inputs["hidden"],
        head,
        weights={"ce": CE * inputs["weights"], "l1": L1 * inputs["weights"]},
        labels=inputs["labels"],
        teacher_hidden=inputs["teacher_hidden"],
        teacher_head=head,
        markov=(inputs["z"], inputs["w2"]),
    )
    loss.total.backward()
    return float(loss.total.detach())


def peak_bytes() -> int:
    """Largest resident memory of this process so far (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int | None:
    """Resident memory now; None where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else None


def show(arguments: argparse.Namespace, report: list[dict[str, Any]]) -> None:
    shape = "N={rows} V={vocab} d={width} r={rank}".format(**sizes(arguments))
    print(f"Head, Markov bias, ce + l1, forward and backward; {shape}, float32, one thread.")
    print(f"Peak memory above weights and inputs; CPU time, least of {arguments.repeats} runs.")
    print(f"{'Markov head':<12} {'plain':>18} {'deepspec':>18} {'memory':>8} {'time':>6}")
    for entry in report:
        columns = [
            f"{entry[p]['peak_bytes'] / MEGABYTE:.0f} MB {entry[p]['cpu_seconds']:.2f} s" for p in PATHS
        ]
        ratios = f"{entry['memory_ratio']:>8.3f} {entry['time_ratio']:>6.2f}"
        print(f"{entry['markov_head']:<12} {columns[0]:>18} {columns[1]:>18} {ratios}")
    gradient = arguments.vocab * arguments.rank * 4 / MEGABYTE
    print(f"A trainable Markov head adds its gradient, V x r x 4 bytes = {gradient:.0f} MB, on both sides.")
    print(f"Memory ratios may be at most {LIMIT:.3f}.")


if __name__ == "__main__":
    main()
