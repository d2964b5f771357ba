"""The text that the pocket target is trained on: this Python's standard library, and arithmetic.

There are three domains, and each is a stream of `Example`s: **math** (generated word problems), **code**
(signature and docstring -> body) and **chat** (questions about Python -> documentation). The text of the
standard library varies with the Python version, so a build records `corpus_hash`.

Held-out prompts are chosen by a hash of their subject, so that neither a duplicate in another file nor
another Python version can bring one into the training text.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import random
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tools.pocket import arithmetic

DOMAINS = ("math", "code", "chat")
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "pydoc_data",
}
MAX_CODE_CHARS, MAX_DOC_CHARS = 900, 420
HELD_OUT_SHARE = 0.04


@dataclass(frozen=True)
class Example:
    """One question with its answer. thought: the content of the thinking block if thinking is on."""

    domain: str
    key: str
    """The subject of the example; its hash decides whether the example is held out."""
    question: str
    answer: str
    thought: str
    thoughtful_answer: str

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(normalise(self.key).encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def normalise(text: str) -> str:
    """The text without case, white space and punctuation, so that near-copies have the same hash."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def math_examples(seed: int) -> Iterator[Example]:
    """An endless stream of word problems."""
    rng = random.Random(seed)
    while True:
        made = arithmetic.problem(rng)
        yield Example("math", made.question, made.question, made.worked, made.notes, made.short)


@cache
def library_files() -> tuple[Path, ...]:
    """The source files of the standard library in order, without installed packages, tests, and files that
    contain paths of the machine that built Python."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if SKIPPED_FOLDERS & set(inside.parts) or path.name.startswith("_sysconfigdata"):
            continue
        if any(part.startswith("config-") for part in inside.parts):
            continue
        found.append(path)
    return tuple(found)


def _read(path: Path) -> str | None:
    try:
        text = path.read_text("utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return None if sys.prefix in text or sys.base_prefix in text else text


@dataclass(frozen=True)
class Definition:
    """A function of the library, with what the code and chat domains need of it."""

    module: str
    owner: str
    name: str
    signature: str
    arguments: tuple[str, ...]
    doc: str
    source: str
    header: str
    body: str

    @property
    def qualified(self) -> str:
        return ".".join(part for part in (self.module, self.owner, self.name) if part)


def _definitions(path: Path) -> Iterator[Definition | tuple[str, str, str]]:
    """Every function of a file as a `Definition`, and every documented class as (module, name, doc)."""
    text = _read(path)
    if text is None:
        return
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    root = Path(sysconfig.get_path("stdlib"))
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")

    def walk(node: ast.AST, owner: str) -> Iterator[Definition | tuple[str, str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                if doc := ast.get_docstring(child):
                    yield module, child.name, doc
                yield from walk(child, child.name)
            elif isinstance(child, ast.FunctionDef):
                yield _definition(child, module, owner)
            elif isinstance(child, ast.If | ast.Try):
                yield from walk(child, owner)

    yield from walk(tree, "")


def _definition(node: ast.FunctionDef, module: str, owner: str) -> Definition:
    doc = inspect.cleandoc(ast.get_docstring(node) or "")
    statements = node.body[1:] if doc else node.body
    parameters = ast.unparse(node.args)
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    body = textwrap.indent("\n".join(ast.unparse(s) for s in statements), "    ")
    header = f"def {node.name}({parameters}):"
    quoted = '    """' + textwrap.indent(doc, "    ").strip() + '"""\n' if doc else ""
    return Definition(
        module=module,
        owner=owner,
        name=node.name,
        signature=f"({parameters})",
        arguments=tuple(n for n in names if n not in ("self", "cls")),
        doc=doc,
        source=f"{header}\n{quoted}{body}",
        header=f"{header}\n{quoted}".rstrip(),
        body=body,
    )


@cache
def library() -> tuple[tuple[Definition, ...], tuple[tuple[str, str, str], ...]]:
    functions, classes = [], []
    for path in library_files():
        for found in _definitions(path):
            functions.append(found) if isinstance(found, Definition) else classes.append(found)
    return tuple(functions), tuple(classes)


def _opening(doc: str, limit: int = MAX_DOC_CHARS) -> str:
    """The first whole paragraphs of a docstring within `limit` characters, and at least one sentence."""
    kept = ""
    for paragraph in re.split(r"\n\s*\n", doc.strip()):
        if kept and len(kept) + len(paragraph) > limit:
            break
        kept = f"{kept}\n\n{paragraph.rstrip()}" if kept else paragraph.rstrip()
    return kept if len(kept) <= limit else kept[:limit].rsplit(".", 1)[0].rsplit("\n", 1)[0].rstrip() + "."


def code_examples() -> Iterator[Example]:
    """Questions with a signature, and a docstring if there is one; the answers are the whole functions."""
    for d in library()[0]:
        if not d.body.strip() or len(d.source) > MAX_CODE_CHARS or d.body.strip() in ("pass", "..."):
            continue
        question = f"Complete this Python function.\n\n```python\n{d.header}\n```"
        answer = f"```python\n{d.header.splitlines()[0]}\n{d.body}\n```"
        uses = sorted({n for n in re.findall(r"[A-Za-z_]\w{2,}(?=\()", d.body)})[:4]
        thought = f"The function `{d.name}` takes {_listing(d.arguments)}."
        if uses:
            thought += f" Its body can call {_listing(uses)}."
        yield Example("code", f"{d.name} {d.doc}" if d.doc else d.header, question, answer, thought, answer)


def _listing(names: tuple[str, ...] | list[str]) -> str:
    quoted = [f"`{n}`" for n in names]
    if not quoted:
        return "no arguments"
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " and " + quoted[-1]


def chat_examples() -> Iterator[Example]:
    """Questions about functions, classes and language topics; the answers are their documentation."""
    asks = ("What does `{0}` do?", "Explain `{0}`.", "How do I use `{0}`?", "Tell me about `{0}`.")
    functions, classes = library()
    for d in functions:
        if len(d.doc) < 20:
            continue
        kind = f"a method of the class `{d.owner}`" if d.owner else "a function"
        where = f"`{d.name}` is {kind} in the module `{d.module}`."
        takes = f"It takes {_listing(d.arguments)}."
        ask = asks[len(d.qualified + d.doc) % 4].format(f"{d.qualified}{d.signature}")
        answer = f"{where} {takes}\n\n{_opening(d.doc)}"
        yield Example("chat", f"{d.name} {d.doc}", ask, answer, where, f"{takes}\n\n{_opening(d.doc)}")
    for module, name, doc in classes:
        if len(doc) < 20:
            continue
        where = f"`{name}` is a class in the module `{module}`."
        ask = asks[len(name + doc) % 4].format(f"{module}.{name}")
        text = _opening(inspect.cleandoc(doc))
        yield Example("chat", f"{name} {doc}", ask, f"{where}\n\n{text}", where, text)
    yield from _topic_examples()


def _topic_examples() -> Iterator[Example]:
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        for paragraph in re.split(r"\n\s*\n", text):
            flat = " ".join(paragraph.split())
            if not 80 <= len(flat) <= MAX_DOC_CHARS or not flat[0].isupper():
                continue
            start = " ".join(flat.split()[:5])
            ask = f"What does the Python reference say under `{topic}` about: {start} ...?"
            thought = f"This is in the topic `{topic}`."
            yield Example("chat", flat, ask, flat, thought, flat)


def corpus_hash() -> str:
    """A hash of all library examples; two builds with the same hash were trained on the same text."""
    digest = hashlib.sha256()
    for example in (*code_examples(), *chat_examples()):
        digest.update(f"{example.question}\0{example.answer}\0".encode())
    return digest.hexdigest()
