"""GGUF files on disk: found, their headers read, torn and incomplete ones refused before anything is loaded.

llama.cpp's format: a header of keys and values, a table of tensors, and their data. A large model may be
split over several files, each with a header of its own; the first one has the keys.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from deepspec.errors import TargetError

MAGIC = b"GGUF"
EMBEDDING = "token_embd.weight"
AGAIN = "copy or download it again"
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_TEXT, _LIST = 8, 9
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_DRAFTS = ("eagle", "dflash", "dspark")
"""What the architectures of drafts are called in llama.cpp."""


class Stored(NamedTuple):
    """A tensor: dims in ggml's order (fastest first), format as ggml numbers it, place in its file's data."""

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int
    part: int

    @property
    def numbers(self) -> int:
        return prod(self.dims)


class Part(NamedTuple):
    """One file: where the data of its tensors begins."""

    path: Path
    data: int


@dataclass(frozen=True)
class Gguf:
    """The headers of a model. pairs: the keys with their values as bytes, to be written again."""

    parts: tuple[Part, ...]
    values: Mapping[str, Any]
    pairs: Mapping[str, bytes]
    tensors: tuple[Stored, ...]

    @property
    def path(self) -> Path:
        return self.parts[0].path

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))

    def value(self, key: str) -> Any:
        """The value of an architecture's key, such as `rope.freq_base`; None if there is none."""
        return self.values.get(f"{self.architecture}.{key}")

    def tensor(self, name: str) -> Stored | None:
        return next((t for t in self.tensors if t.name == name), None)

    def data(self, tensor: Stored) -> bytes:
        part = self.parts[tensor.part]
        with part.path.open("rb") as file:
            file.seek(part.data + tensor.offset)
            return file.read(_size(tensor, part.path))

    def formats(self) -> list[tuple[str, int, float]]:
        """(format, tensors, share of all weights) of each number format, the largest share first."""
        counts, weights = Counter[str](), Counter[str]()
        for t in self.tensors:
            counts[_format(t.kind)] += 1
            weights[_format(t.kind)] += t.numbers
        return [(kind, counts[kind], n / weights.total()) for kind, n in weights.most_common()]

    def write_header(self, out: BinaryIO, tensors: list[Stored], without: tuple[str, ...] = ()) -> None:
        """Write a header with these tensors and the keys that do not start with one of `without`."""
        kept = {k: pair for k, pair in self.pairs.items() if not k.startswith(without)}
        out.write(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(kept)) + b"".join(kept.values()))
        for t in tensors:
            name = t.name.encode("utf-8")
            out.write(struct.pack("<Q", len(name)) + name)
            out.write(struct.pack(f"<I{len(t.dims)}QIQ", len(t.dims), *t.dims, t.kind, t.offset))
        out.write(bytes(-out.tell() % int(self.values.get("general.alignment", 32))))


def find_gguf(path: str | Path) -> Path | None:
    """The GGUF file that a path names: itself (known by its suffix or its first bytes), or the one in a
    directory without a config.json; None for anything else. Raises TargetError for several."""
    path = Path(path)
    if path.is_file():
        try:
            with path.open("rb") as file:
                return path if path.suffix.lower() == ".gguf" or file.read(4) == MAGIC else None
        except OSError as error:
            raise TargetError(
                f"the file cannot be read: {error.strerror}",
                where=str(path),
                next_step="see that you may read it",
            ) from error
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(f for f in path.glob("*.gguf") if not f.name.startswith("mmproj"))
    parts = [f for f in files if (m := _PART.fullmatch(f.name)) and int(m[2]) != 1]
    models = [f for f in files if f not in parts] or parts[:1]
    if len(models) > 1:
        raise TargetError(
            f"the directory holds {len(models)} GGUF models: {', '.join(f.name for f in models[:6])}",
            where=str(path),
            next_step="give the path of one of these files",
        )
    return models[0] if models else None


def read_gguf(path: Path, name: str) -> Gguf:
    """Read and check the headers of a model's files. Raises TargetError for files that are torn, missing, or
    no language model, and if the extra `gguf` is not installed."""
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise TargetError(
            f"{name} is a GGUF file, and reading it needs {' and '.join(missing)}",
            next_step="pip install 'deepspec[gguf]'",
        )
    first = _read_part(path, 0)
    what = _not_a_target(first)
    if what is not None:
        raise TargetError(f"{name} is {what}, and not a target model", where=str(path), next_step=_OTHER)
    parts = [first, *(_read_part(p, i) for i, p in enumerate(_other_parts(path, first.values), 1))]
    tensors = [t for part in parts for t in part.tensors]
    declared = first.values.get("split.tensors.count", len(tensors))
    if declared != len(tensors):
        raise TargetError(
            f"the parts of the model hold {len(tensors)} tensors together, and the first one says {declared}",
            where=str(path),
            next_step="copy or download all parts again, from one model",
        )
    if not any(t.name == EMBEDDING for t in tensors):
        raise TargetError(
            f"{name} holds no token embedding: it is not a whole language model",
            where=str(path),
            next_step=_OTHER,
        )
    return Gguf(tuple(p.parts[0] for p in parts), first.values, first.pairs, tuple(tensors))


_OTHER = "give the GGUF file of the language model itself"


def _not_a_target(gguf: Gguf) -> str | None:
    architecture, kind = gguf.architecture, gguf.values.get("general.type", "model")
    if any(word in architecture for word in _DRAFTS):
        return f"a draft ({architecture})"
    if architecture == "clip" or kind == "mmproj":
        return "the image or audio part of a model"
    return f"a GGUF file of type {kind!r}" if kind != "model" else None


def _other_parts(path: Path, values: Mapping[str, Any]) -> list[Path]:
    """The other files of a split model. Raises TargetError if `path` is not the first, or one is missing."""
    count, number = int(values.get("split.count", 0)), int(values.get("split.no", 0))
    if count < 2:
        return []
    named = _PART.fullmatch(path.name)
    if number != 0 or named is None:
        raise TargetError(
            f"the file is part {number + 1} of {count} of a split model",
            where=str(path),
            next_step=f"give the first part, named …-00001-of-{count:05}.gguf, with the others next to it",
        )
    paths = [path.with_name(f"{named[1]}-{i:05}-of-{count:05}{named[4]}") for i in range(2, count + 1)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise TargetError(
            f"{len(missing)} of the {count} parts of the model are missing: {', '.join(missing[:3])}",
            where=str(path.parent),
            next_step="copy or download them into the same directory",
        )
    return paths


def _read_part(path: Path, number: int) -> Gguf:
    try:
        with path.open("rb") as file:
            start = file.read(40)
            if start.startswith(MAGIC):
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
                    part = _parse(_Cursor(blob), path, number)
        if not start.startswith(MAGIC):
            pointer = start.startswith(b"version https://git-lfs")
            raise TargetError(
                "the file is a Git LFS pointer, not the weights"
                if pointer
                else "the file is not a GGUF file",
                where=str(path),
                next_step="run `git lfs pull` there" if pointer else AGAIN,
            )
    except (struct.error, KeyError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise TargetError(
            "the file is torn: its header does not end, or is damaged", where=str(path), next_step=AGAIN
        ) from error
    end = max((part.parts[0].data + t.offset + _size(t, path) for t in part.tensors), default=0)
    if (size := path.stat().st_size) < end:
        raise TargetError(
            f"the file is torn: it has {size:,} bytes, and its header describes {end:,}",
            where=str(path),
            next_step=AGAIN,
        )
    return part


def _parse(cursor: _Cursor, path: Path, number: int) -> Gguf:
    cursor.at = len(MAGIC)
    version = cursor.number("I")
    if version not in (2, 3):
        raise TargetError(
            f"the file is GGUF version {version}, or big-endian; versions 2 and 3 can be read",
            where=str(path),
            next_step="use a newer file of the model",
        )
    tensor_count, pair_count = cursor.number("Q"), cursor.number("Q")
    values: dict[str, Any] = {}
    pairs: dict[str, bytes] = {}
    for _ in range(pair_count):
        start = cursor.at
        key = cursor.text()
        values[key] = cursor.value(cursor.number("I"))
        pairs[key] = cursor.blob[start : cursor.at]
    tensors = []
    for _ in range(tensor_count):
        name = cursor.text()
        dims = tuple(cursor.number("Q") for _ in range(cursor.number("I")))
        tensors.append(Stored(name, dims, cursor.number("I"), cursor.number("Q"), number))
    data = cursor.at + -cursor.at % int(values.get("general.alignment", 32))
    return Gguf((Part(path, data),), values, pairs, tuple(tensors))


class _Cursor:
    """A place in a file's bytes. Raises struct.error past the end."""

    def __init__(self, blob: mmap.mmap) -> None:
        self.blob, self.at = blob, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.blob, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        start = self._room(self.number("Q"))
        return self.blob[start : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            return self.number(_NUMBERS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind in _NUMBERS:
            code = f"<{count}{_NUMBERS[kind]}"
            return list(struct.unpack_from(code, self.blob, self._room(struct.calcsize(code))))
        return [self.value(kind) for _ in range(count)]

    def _room(self, size: int) -> int:
        start, self.at = self.at, self.at + size
        if self.at > len(self.blob):
            raise struct.error("past the end of the file")
        return start


def _format(kind: int) -> str:
    try:
        return str(import_module("gguf").GGMLQuantizationType(kind).name)
    except ValueError:
        return f"type {kind}"


def _size(tensor: Stored, path: Path) -> int:
    """The bytes of a tensor's data. Raises TargetError for a format that the gguf package does not know."""
    gguf = import_module("gguf")
    try:
        elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
    except (ValueError, KeyError) as error:
        raise TargetError(
            f"{tensor.name} has a number format that the gguf package does not know (type {tensor.kind})",
            where=str(path),
            next_step="pip install --upgrade gguf, or use a file with a common format, such as Q8_0",
        ) from error
    return tensor.numbers // elements * size
