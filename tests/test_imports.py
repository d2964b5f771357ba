"""The laws between rooms, read from the source of every file: who may import whom.

Imports inside functions and under TYPE_CHECKING count, as do `importlib.import_module("name")` calls: a law
is about what a room knows, not about when it loads it.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import deepspec

PACKAGE = Path(deepspec.__file__).parent
ROOT = PACKAGE.parent.parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(("deepspec", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in FILES
}

# Torch, the standard library, and one another: nothing else.
MATHS = {"drafts", "maths"}
# Beyond that, the drafts read family facts and may tell a user that a draft does not fit.
DRAFTS_ALSO = {"errors", "families"}
TRACKERS = {"tensorboard", "torch.utils.tensorboard", "wandb", "mlflow", "trackio"}
LIGHT = ("deepspec.config", "deepspec.drafts.spec")
TRANSFORMERS_ROOMS = ("deepspec.targets", "deepspec.data.template", "deepspec.data.tokens")


def module_of(path: Path) -> str:
    name = ".".join(("deepspec", *path.relative_to(PACKAGE).with_suffix("").parts))
    return name.removesuffix(".__init__")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def room(module: str) -> str:
    """The room of deepspec.data.tokens is data; that of the package itself is the empty name."""
    return [*module.split("."), ""][1]


def imports_of(source: str, module: str, is_package: bool) -> set[str]:
    """Every module that a source imports, by full name; `from a import b` also gives a.b if that is one."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            ours = {f"{base}.{alias.name}" for alias in node.names}
            # torch's submodules cannot be listed from here, so both readings count.
            submodules = {name for name in ours if name in MODULES or within(name, "torch")}
            found |= submodules if base == "deepspec" and submodules else {base} | submodules
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                found.add(first.value)
    return found - {"__future__"}


IMPORTS = {
    module_of(path): imports_of(path.read_text("utf-8"), module_of(path), path.name == "__init__.py")
    for path in FILES
}


def importers_of(*names: str) -> dict[str, list[str]]:
    """{module: what it imports of `names`}, packages taken with all inside them."""
    hits = {m: sorted(i for i in found if any(within(i, n) for n in names)) for m, found in IMPORTS.items()}
    return {module: hit for module, hit in hits.items() if hit}


def strangers(module: str, allowed_rooms: set[str], allowed_packages: tuple[str, ...]) -> list[str]:
    """What a module imports beyond the standard library, the rooms and the packages allowed to it."""
    bad = []
    for name in IMPORTS[module]:
        top = name.split(".")[0]
        if top == "deepspec":
            allowed = room(name) in allowed_rooms
        else:
            allowed = top in sys.stdlib_module_names or top in allowed_packages
        if not allowed:
            bad.append(name)
    return sorted(bad)


@pytest.fixture(scope="module")
def heavy_modules() -> dict[str, list[str]]:
    """{module: which of torch and transformers are loaded once it is imported}, of the command line, the
    recipes and the planner. All are imported one after another in a fresh process, the command line first:
    what one loads counts for those after it."""
    names = ["deepspec.cli", *LIGHT, *sorted(m for m in MODULES if room(m) == "cost")]
    code = (
        "import importlib, json, sys\nfound = {}\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    found[name] = sorted({'torch', 'transformers'} & set(sys.modules))\n"
        "print(json.dumps(found))"
    )
    paths = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.getenv("PYTHONPATH")]))
    command = [sys.executable, "-c", code, *names]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import transformers.models as t", {"transformers.models"}),
        ("from deepspec import errors", {"deepspec.errors"}),
        ("from deepspec import __version__", {"deepspec"}),
        ("from deepspec.errors import nearest", {"deepspec.errors"}),
        ("from .. import errors", {"deepspec.errors"}),
        ("from ..errors import nearest", {"deepspec.errors"}),
        ("def f():\n    import wandb", {"wandb"}),
        ("if TYPE_CHECKING:\n    from transformers import X", {"transformers"}),
        ("import importlib\nm = importlib.import_module('mlflow')", {"importlib", "mlflow"}),
        ("from torch import distributed", {"torch", "torch.distributed"}),
        ("from __future__ import annotations", set()),
    ],
)
def test_no_way_of_importing_slips_past_the_reader(line, expected):
    assert imports_of(line, "deepspec.maths.verify", is_package=False) == expected


def test_relative_imports_resolve_from_packages_too():
    assert imports_of("from ..errors import nearest", "deepspec.drafts.heads", False) == {"deepspec.errors"}
    assert imports_of("from ..errors import nearest", "deepspec.drafts", True) == {"deepspec.errors"}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if room(m) in MATHS))
def test_tensor_maths_know_torch_and_each_other_only(module):
    drafts = room(module) == "drafts"  # whose settings are a checked record
    rooms, libraries = (MATHS | DRAFTS_ALSO, ("torch", "pydantic")) if drafts else (MATHS, ("torch",))
    assert strangers(module, rooms, libraries) == []


@pytest.mark.parametrize("module", sorted(m for m in MODULES if room(m) in {"errors", "families"}))
def test_errors_and_families_know_the_standard_library_only(module):
    assert strangers(module, set(), ()) == []


def test_torch_distributed_stays_in_dist():
    assert {m for m in importers_of("torch.distributed") if not within(m, "deepspec.train.dist")} == set()


def test_drafts_do_not_know_where_their_input_comes_from():
    known = importers_of("deepspec.data", "deepspec.train", "deepspec.targets")
    assert {m: hit for m, hit in known.items() if room(m) == "drafts"} == {}


def test_train_and_decode_do_not_import_each_other():
    assert {m for m in importers_of("deepspec.decode") if room(m) == "train"} == set()
    assert {m for m in importers_of("deepspec.train") if room(m) == "decode"} == set()


def test_data_does_not_know_the_drafts():
    assert {m: hit for m, hit in importers_of("deepspec.drafts").items() if room(m) == "data"} == {}


def test_transformers_stays_in_its_rooms():
    users = importers_of("transformers")
    assert {m for m in users if not any(within(m, allowed) for allowed in TRANSFORMERS_ROOMS)} == set()


@pytest.mark.parametrize("module", sorted(m for m in MODULES if room(m) == "cost"))
def test_planner_is_arithmetic_and_loads_neither_torch_nor_transformers(heavy_modules, module):
    assert heavy_modules[module] == []


def test_trackers_stay_in_log():
    assert {m: hit for m, hit in importers_of(*TRACKERS).items() if m != "deepspec.log"} == {}


def test_data_does_not_know_the_decoder():
    assert {m: hit for m, hit in importers_of("deepspec.decode").items() if room(m) == "data"} == {}


def test_no_room_imports_itself_through_others():
    rooms: dict[str, set[str]] = {}
    for module, found in IMPORTS.items():
        ours = {room(name) for name in found if within(name, "deepspec")} - {"", room(module)}
        rooms.setdefault(room(module), set()).update(ours)
    reached = {name: set(below) for name, below in rooms.items()}
    for _ in rooms:
        for below in reached.values():
            below |= {further for name in below for further in reached.get(name, ())}
    assert {name for name, below in reached.items() if name in below} == set()


IMPORT_NAMES = {"pyyaml": "yaml", "tensorboard": "tensorboard"}
"""What a dependency is imported as, if not by its own name."""


def test_every_dependency_is_used():
    """matplotlib was installed for everybody and imported by nobody."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    sources = [path.read_text("utf-8") for path in FILES]
    unused = []
    for requirement in project["dependencies"]:
        package = re.split(r"[<>=!~\[ ]", requirement)[0]
        name = IMPORT_NAMES.get(package, package.replace("-", "_"))
        used = re.compile(rf"^\s*(import|from) {name}\b|import_tracker\(\"{name}\"", re.MULTILINE)
        if not any(used.search(source) for source in sources):
            unused.append(package)
    assert unused == []


def test_nothing_imports_the_command_line():
    users = importers_of("deepspec.cli")
    assert {m for m in users if not within(m, "deepspec.cli") and m != "deepspec.__main__"} == set()


def test_help_does_not_wait_for_torch(heavy_modules):
    assert heavy_modules["deepspec.cli"] == []


@pytest.mark.parametrize("module", LIGHT)
def test_recipes_and_drafts_settings_load_without_torch(heavy_modules, module):
    assert heavy_modules[module] == []


@pytest.mark.parametrize("name", sorted({room(m) for m in MODULES} - {"", "__main__"}))
def test_architecture_page_names_every_room(name):
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rooms = page.split("## Rooms")[1].split("\n## ")[0]
    assert any(f"`{name}{ending}`" in rooms for ending in (".py", "/")), name


def test_public_names_mean_the_same_on_every_access():
    """`deepspec.verify` was the function on the first access and a module of that name on every later one:
    importing a module sets its name on the package, where `__getattr__` no longer is asked."""
    for module in MODULES - {"deepspec.__main__"}:
        importlib.import_module(module)
    names = [name for name in deepspec.__all__ if name != "__version__"]
    assert [name for name in names if getattr(deepspec, name) is not deepspec.__getattr__(name)] == []


def test_no_file_grows_past_450_lines_and_no_function_past_80():
    """A longer one hides a second idea. The signature of a command, which lists options, does not count."""
    long = []
    for path in FILES:
        source = path.read_text("utf-8")
        if source.count("\n") > 450:
            long.append(path.name)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                start = node.body[0].lineno if path.parent.name == "cli" else node.lineno
                if (node.end_lineno or 0) - start >= 80:
                    long.append(f"{path.name}: {node.name}")
    assert long == []
