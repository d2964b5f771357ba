"""Our drafts in an engine that is not ours: llama.cpp's server, built from the source in its Python package.

    make test-servers                           build (once), export, serve, measure, check, write the table
    python benchmarks/servers.py --prompts 9    measure only, and print the results

Both engines decode the same prompts (token ids, so no template is involved) greedily, in float32, key/value
caches included, from the same weights. Their conventions are brought together like this:

- A round commits its accepted proposals and one token of the target's. The first new token comes from the
  prefill and is in no round, in either engine.
- Near the budget the server cuts a draft to what still fits, so a round never commits more than that; ours
  proposes whole blocks. Of ours, `served_rounds` counts what fits.
- With room for one token the server takes a plain step, which it counts in no round; nor do we.
- A stop token inside a round ends the text, not the count: both count all that was accepted.

τ is pooled: committed tokens over rounds. The server's come from its own counters: accepted proposals from
the response's `timings.draft_n_accepted`, rounds from the difference in `/metrics` around each request.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from deepspec.checkpoints.draft import load_draft
from deepspec.checkpoints.export import Exported
from deepspec.checkpoints.gguf_draft import export_gguf
from deepspec.checkpoints.servers import served_as
from deepspec.decode.engine import Decoder, Generation, Request
from deepspec.drafts.base import NeuralDraft
from deepspec.files import write_json
from deepspec.log import note
from deepspec.maths.acceptance import bootstrap_ratio
from deepspec.measure.evaluate import load_prompts
from deepspec.measure.rows import Prompt, first_difference
from deepspec.pocket import packaged, prompts_path
from deepspec.targets import Target

PACKAGE = "llama-cpp-python==0.3.36"
DRAFTS = ("pocket-eagle3-portable", "pocket-dflash", "pocket-dspark")
BUDGET = 96
PROMPTS = 45
BOOTSTRAP_SEED = 20
PAGE = Path(__file__).parent.parent / "docs" / "serving.md"
ROUNDS = re.compile(r"^llamacpp:spec_decode_num_drafts_total (\d+)", re.MULTILINE)


# ── the engine ────────────────────────────────────────────────────────────────────────────────────────


def cache() -> Path:
    """Where the engine is built, once: $DEEPSPEC_CACHE, or the user's cache."""
    root = os.environ.get("DEEPSPEC_CACHE") or Path.home() / ".cache" / "deepspec"
    return Path(root) / "llama-server"


@dataclass(frozen=True)
class Engine:
    """llama.cpp: its source tree, its server, and what its converter needs in addition to our packages."""

    source: Path
    binary: Path
    packages: Path


def engine(folder: Path) -> Engine:
    """The engine in a folder, built there if it isn't yet: about eleven minutes on two idle cores.

    A build that was cut off goes on where it stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source, packages = folder / "llama.cpp", folder / "packages"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if not source.is_dir():
        note(f"fetching {PACKAGE}, whose source archive holds llama.cpp")
        name = PACKAGE.split("=")[0]
        run([*pip, "download", PACKAGE, "--no-deps", "--no-binary", name, "--dest", str(folder)], folder)
        unpack(next(folder.glob("llama_cpp_python-*.tar.gz")), source)
    if not packages.is_dir():
        run([*pip, "install", "sentencepiece", "--no-deps", "--target", str(packages)], folder)
    build = folder / "build"
    binary = build / "bin" / "llama-server"
    if not binary.is_file():
        note("building llama-server, once")
        switches = ("LLAMA_CURL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_UI", "LLAMA_BUILD_WEBUI")
        run(
            ["cmake", "-S", str(source), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
            + [f"-D{switch}=OFF" for switch in switches],
            folder,
        )
        jobs = str(os.cpu_count() or 1)
        run(["cmake", "--build", str(build), "--target", "llama-server", "-j", jobs], folder)
    return Engine(source, binary, packages)


def unpack(archive: Path, source: Path) -> None:
    """The archive's vendor/llama.cpp as a directory of its own, whole or not at all."""
    part = source.with_name(f".{source.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(archive) as opened:
        inside = [m for m in opened.getmembers() if "/vendor/llama.cpp/" in m.name]
        opened.extractall(part, inside, filter="data")
    next(part.glob("*/vendor/llama.cpp")).rename(source)
    shutil.rmtree(part)


def run(words: Sequence[str], folder: Path, **environment: str) -> None:
    """A command; what it says goes to a log, whose end is shown when the command fails."""
    log = folder / "log.txt"
    with log.open("ab") as file:
        code = subprocess.run(words, stdout=file, stderr=file, env=os.environ | environment).returncode
    if code:
        tail = "\n".join(log.read_text("utf-8", "replace").splitlines()[-20:])
        raise RuntimeError(f"{words[0]} ended with {code}; {log} ends with:\n{tail}")


def convert(found: Engine, model: Path, out: Path) -> Path:
    """A target as float32 GGUF, by llama.cpp's converter; drafts are exported as GGUF."""
    driver = Path(__file__).with_name("llamacpp_convert.py")
    words = [sys.executable, str(driver), str(found.source), str(model)]
    run([*words, "--outtype", "f32", "--outfile", str(out)], out.parent, PYTHONPATH=str(found.packages))
    return out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(
    found: Engine, target: Path, port: int, log: Path, words: Sequence[str] = (), parallel: int = 1
) -> subprocess.Popen[bytes]:
    """A llama-server with so many slots of 1,024 tokens, when it is ready; `words` add a draft."""
    command = [str(found.binary), "-m", str(target), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--parallel", str(parallel), "--ctx-size", str(1024 * parallel), "--metrics", "--no-webui"]
    command += ["--cache-type-k", "f32", "--cache-type-v", "f32", "--threads", str(torch.get_num_threads())]
    # Its flash attention on the CPU works in float16 inside: log probabilities are off by up to 5e-3 then.
    command += ["--flash-attn", "off"]
    with log.open("ab") as file:
        server = subprocess.Popen([*command, *words], stdout=file, stderr=file)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            wait(server, client, log, 300)
    except BaseException:
        server.kill()
        raise
    return server


@contextmanager
def serving(found: Engine, target: Path, words: Sequence[str], log: Path) -> Iterator[httpx.Client]:
    """A running llama-server with one slot; `words` add a draft."""
    port = free_port()
    with start(found, target, port, log, words) as server:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
                yield client
        finally:
            server.terminate()


def wait(server: subprocess.Popen[bytes], client: httpx.Client, log: Path, seconds: float) -> None:
    """Return once a server is healthy. Raises RuntimeError if it ends, or takes longer than `seconds`."""
    end = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < end:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    raise RuntimeError(
        f"the server did not start; {log} ends with:\n{log.read_text('utf-8', 'replace')[-3000:]}"
    )


# ── measuring ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Answer:
    """What one engine said to one prompt. committed: tokens of each round, or their sum in one entry;
    rounds: how many there were; seconds: after the prefill."""

    tokens: list[int]
    committed: int
    rounds: int
    seconds: float


def ask(client: httpx.Client, prompt: Prompt, budget: int) -> Answer:
    """The server's greedy answer, with its own counts."""
    before = _rounds(client)
    response = client.post(
        "/completion",
        json={
            "prompt": list(prompt.ids),
            "n_predict": budget,
            "temperature": 0,
            "cache_prompt": False,
            "return_tokens": True,
        },
    )
    said = response.raise_for_status().json()
    timings = said["timings"]
    rounds = _rounds(client) - before
    accepted = timings.get("draft_n_accepted", 0)
    return Answer(said["tokens"], rounds + accepted, rounds, timings["predicted_ms"] / 1000)


def _rounds(client: httpx.Client) -> int:
    found = ROUNDS.search(client.get("/metrics").raise_for_status().text)
    assert found is not None, "the server's metrics have no count of rounds"
    return int(found[1])


def served_rounds(accepted: Sequence[int], budget: int) -> list[int]:
    """Tokens committed per round as the server counts them, from accepted proposals per round of ours."""
    room, rounds = budget - 1, []
    for count in accepted:
        if room < 2:
            break
        rounds.append(min(count + 1, room))
        room -= rounds[-1]
    return rounds


def decode(target: Target, draft: NeuralDraft | None, prompt: Prompt, budget: int) -> Answer:
    """Our own greedy answer, counted as the server counts."""
    request = Request(prompt.ids, budget, stop_token_ids=target.stop_token_ids)
    (found,) = Decoder(target, draft).run([request])
    assert isinstance(found, Generation)
    rounds = served_rounds(found.accepted, budget) if draft is not None else []
    return Answer(found.token_ids, sum(rounds), len(rounds), found.seconds)


def compare(
    target: Target, prompts: Sequence[Prompt], ours: Sequence[Answer], theirs: Sequence[Answer]
) -> dict[str, Any]:
    """Texts side by side, and both accepted lengths with 95% intervals over prompts."""
    verdicts = [
        same(target, p.ids, a.tokens, b.tokens) for p, a, b in zip(prompts, ours, theirs, strict=True)
    ]
    tau = {}
    for name, answers in (("ours", ours), ("theirs", theirs)):
        found = bootstrap_ratio(
            [float(a.committed) for a in answers], [float(a.rounds) for a in answers], BOOTSTRAP_SEED
        )
        tau[name] = None if found is None else found._asdict()
    return {
        "prompts": len(prompts),
        "identical": verdicts.count("identical"),
        "near_ties": verdicts.count("near tie"),
        "different": [p.id for p, v in zip(prompts, verdicts, strict=True) if v == "different"],
        "tau": tau,
        "rounds": {"ours": sum(a.rounds for a in ours), "theirs": sum(a.rounds for a in theirs)},
    }


def same(target: Target, prompt: Sequence[int], ours: list[int], theirs: list[int]) -> str:
    """`parting`, of answers without stop tokens, which the server may leave out."""
    ours, theirs = ([t for t in tokens if t not in target.stop_token_ids] for tokens in (ours, theirs))
    return parting(target, prompt, ours, theirs)


def parting(target: Target, prompt: Sequence[int], ours: list[int], theirs: list[int]) -> str:
    """identical; near tie, where our target's logits of the two tokens at the parting are equal but for
    rounding; or different."""
    at, tie = first_difference(target, Prompt("", "", "", tuple(prompt)), ours, theirs)
    return "identical" if at is None else "near tie" if tie else "different"


def rate(answers: Sequence[Answer]) -> float:
    return sum(len(a.tokens) for a in answers) / sum(a.seconds for a in answers)


def served_target(found: Engine, work: Path) -> tuple[Path, Path]:
    """The pocket target, and the same as GGUF."""
    work.mkdir(exist_ok=True)
    model = Path(packaged("pocket"))
    return model, convert(found, model, work / "target.gguf")


def measure(names: Sequence[str] = DRAFTS, limit: int = PROMPTS, budget: int = BUDGET) -> dict[str, Any]:
    """Each draft exported as GGUF and served by llama-server, next to our own decoding."""
    folder = cache()
    found = engine(folder)
    sys.path.append(str(found.source / "gguf-py"))  # the package gguf, if it is not installed
    work = folder / "pocket"
    _, gguf = served_target(found, work)
    target = Target.from_pretrained("pocket", dtype="float32", device="cpu")
    prompts = load_prompts(prompts_path("pocket:test"), target, limit=limit)
    with serving(found, gguf, [], work / "plain.log") as client:
        ask(client, prompts[0], budget)  # first-call costs belong to nobody
        plain = [ask(client, p, budget) for p in prompts]
    without = [decode(target, None, p, budget) for p in prompts]
    rows = []
    for name in names:
        note(f"{name}: exported and served")
        draft = load_draft(name, target)
        exported = export_gguf(name, work / f"{name}.gguf", target, dtype="float32")
        with serving(found, gguf, draft_words(draft, exported), work / f"{name}.log") as client:
            ask(client, prompts[0], budget)
            theirs = [ask(client, p, budget) for p in prompts]
        ours = [decode(target, draft, p, budget) for p in prompts]
        rows.append(
            {
                "draft": name,
                "algorithm": draft.spec.algorithm,
                "architecture": exported.architecture,
                **compare(target, prompts, ours, theirs),
                "tokens_per_s": {
                    "theirs": rate(theirs),
                    "theirs_plain": rate(plain),
                    "ours": rate(ours),
                    "ours_plain": rate(without),
                },
            }
        )
    return {
        "engine": f"llama.cpp ({PACKAGE})",
        "budget": budget,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }


def results_file() -> Path:
    return cache() / "results.json"


def measure_and_keep() -> dict[str, Any]:
    """Measure everything, and keep the results for the page."""
    results = measure()
    write_json(results_file(), results)
    return results


def draft_words(draft: NeuralDraft, exported: Exported) -> list[str]:
    """llama-server's options for a draft, which it keeps drafting with however unsure it is."""
    words = ["-md", str(exported.path), "--spec-type", f"draft-{served_as(draft.spec).method}"]
    words += ["--spec-draft-n-max", str(exported.proposals), "--spec-draft-p-min", "0"]
    return [*words, "--cache-type-k-draft", "f32", "--cache-type-v-draft", "f32"]


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────


def table(results: dict[str, Any]) -> str:
    """Results as a Markdown table."""
    lines = [
        "| engine | draft | served as | τ ours | τ theirs | difference | same texts "
        "| tokens/s plain → with draft: theirs | ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        ours, theirs = row["tau"]["ours"], row["tau"]["theirs"]
        speed = row["tokens_per_s"]
        same = f"{row['identical']} of {row['prompts']}"
        same += f", {row['near_ties']} part at a near-tie" if row["near_ties"] else ""
        cells = [
            results["engine"],
            row["draft"],
            f"`{row['architecture']}`",
            _interval(ours),
            _interval(theirs),
            f"{theirs['value'] / ours['value'] - 1:+.1%}",
            same,
            f"{speed['theirs_plain']:.0f} → {speed['theirs']:.0f}",
            f"{speed['ours_plain']:.0f} → {speed['ours']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Greedy, float32, at most {results['budget']} new tokens, {results['rows'][0]['prompts']} held-out "
        f"prompts (domains in turns), {results['threads']} thread(s), one request at a time; 95% intervals "
        "over prompts. The server's tokens/s leave the prefill out, ours count it.",
    ]
    return "\n".join(lines)


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.2f}, {found['high']:.2f}]"


def write_page(text: str, marker: str = "measured", page: Path = PAGE) -> None:
    """Put a table between the page's two markers."""
    begin, end = f"<!-- {marker} -->\n", f"<!-- /{marker} -->"
    head, rest = page.read_text("utf-8").split(begin)
    page.write_text(f"{head}{begin}{text}\n{end}{rest.split(end)[1]}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--max-new-tokens", type=int, default=BUDGET)
    parser.add_argument("--drafts", nargs="+", default=list(DRAFTS))
    parser.add_argument(
        "--write",
        nargs="?",
        const=str(results_file()),
        metavar="RESULTS.json",
        help="no measuring: write a file's table (by default the latest results') to the page",
    )
    given = parser.parse_args()
    if given.write:
        write_page(table(json.loads(Path(given.write).read_text("utf-8"))))
        return
    print(json.dumps(measure(given.drafts, given.prompts, given.max_new_tokens), indent=1))


if __name__ == "__main__":
    main()
