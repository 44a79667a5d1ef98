"""The house stands on floors: imports go down only, no matter where in a file they are written.

Read from the source with `ast`, so that an import inside a function counts and nothing needs to be installed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "burnish"

FLOOR = {  # what is called by a name here is a file or a room of burnish/
    **dict.fromkeys(("cli", "__main__"), 9),
    "workflow": 8,
    "plan": 7,
    "prepare": 6,
    **dict.fromkeys(("train", "serve", "export"), 5),
    "generate": 4,
    "tuning": 3,
    **dict.fromkeys(("chat", "data", "model"), 2),
    "kernels": 1,
    **dict.fromkeys(("types", "errors", "console", "ranks", "arguments", "environment"), 0),
}
# The arguments of a room belong to the ground floor, whatever floor the room is on.
GROUND = {"train.fields", "train.checks", "train.training_args", "train.zero"}
HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate", "matplotlib", "safetensors"}
LAUNCHER = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "NNODES", "NPROC_PER_NODE"),
    *("MASTER_ADDR", "MASTER_PORT", "FORCE_TORCHRUN"),
}


@dataclass(frozen=True)
class Import:
    module: str  # "burnish.data.store", "torch.nn"
    line: int
    at_top: bool  # done when the file is imported
    for_types: bool  # under `if TYPE_CHECKING:`, never done


@dataclass(frozen=True)
class Source:
    name: str  # "data.store"; a package is called by its folder: "data", and burnish itself by ""
    path: Path
    tree: ast.Module


def sources(root: Path = ROOT) -> dict[str, Source]:
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Source(name, path, ast.parse(path.read_text(encoding="utf-8")))
    return found


def imports(source: Source, known: dict[str, Source]) -> Iterator[Import]:
    """Every import of a file. `from burnish.data import store` is an import of burnish.data.store."""

    def visit(node: ast.AST, at_top: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_top, for_types)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.path}:{node.lineno}: write the import with its whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_file = whole.removeprefix(f"{PACKAGE}.") in known
                yield Import(whole if is_file else str(node.module), node.lineno, at_top, for_types)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [word.value for word in node.args[:1] if isinstance(word, ast.Constant)]
            yield from (Import(str(name), node.lineno, at_top, for_types) for name in names)
        types_only = for_types or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_top and not inside, types_only)

    yield from visit(source.tree, True, False)


def own_imports(source: Source, known: dict[str, Source]) -> Iterator[tuple[str, Import]]:
    """Imports of burnish's own files: (their name without `burnish.`, the import)."""
    for each in imports(source, known):
        if each.module == PACKAGE or each.module.startswith(f"{PACKAGE}."):
            yield each.module.removeprefix(PACKAGE).removeprefix("."), each


def room(name: str) -> str:
    return name.partition(".")[0]


def floor(name: str) -> int:
    if name in GROUND or name.endswith(".arguments"):
        return 0
    assert room(name) in FLOOR, f"{PACKAGE}/{room(name)} stands on no floor: name it in FLOOR (and in the house's plan)"
    return FLOOR[room(name)]


def climbing(known: dict[str, Source]) -> list[str]:
    """Imports of a higher floor, or of another room on the same one."""
    found = []
    for name, source in known.items():
        for target, each in own_imports(source, known):
            if not name or not target or (room(name) == room(target) and floor(name) >= floor(target)):
                continue
            sideways = floor(name) == floor(target) != 0 and "." in name  # files outside rooms may
            if floor(target) > floor(name) or sideways:
                step = "sideways" if sideways else "up"
                found.append(f"{source.path.name}:{each.line}: {name} imports {step}: {target}")
    return found


def circles(known: dict[str, Source]) -> list[str]:
    """Imports that lead back to where they began; those for types alone are never done and do not count."""
    edges = {
        name: sorted({target for target, each in own_imports(source, known) if not each.for_types} - {name})
        for name, source in known.items()
    }
    found: list[str] = []
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in edges.get(name, []):
                walk(target, [*path, name])
            done.add(name)

    for name in edges:
        walk(name, [])
    return found


def test_every_file_stands_on_a_floor():
    assert len([floor(name) for name in sources() if name]) > 20


def test_imports_go_down_only_and_rooms_of_a_floor_do_not_know_each_other():
    assert climbing(sources()) == []


def test_no_import_leads_back_to_where_it_began():
    assert circles(sources()) == []


def test_the_init_of_a_room_is_empty():
    rooms = [path for path in (ROOT / PACKAGE).glob("*/__init__.py") if path.read_text(encoding="utf-8").strip()]
    assert rooms == []


def test_reading_a_configuration_imports_nothing_heavy():
    """The files that `import burnish.arguments.parse` runs: itself, and what stands at the top of what it imports."""
    known, seen, heavy = sources(), set(), []
    waiting = ["arguments.parse"]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in known:
            continue
        seen.add(name)
        for each in imports(known[name], known):
            if each.at_top and not each.for_types:
                if room(each.module) in HEAVY:
                    heavy.append(f"{name} line {each.line}: {each.module}")
                elif room(each.module) == PACKAGE:
                    waiting.append(each.module.removeprefix(PACKAGE).removeprefix("."))
    assert {"arguments.parse", "errors", "data.arguments"} <= seen
    assert heavy == []


def test_only_patch_names_classes_inside_the_models_of_transformers():
    found = []
    for name, source in sources().items():
        if name == "model.patch":
            continue
        for node in ast.walk(source.tree):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            named += [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
            named += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
            if any(text.startswith("transformers.models") for text in named):
                found.append(f"{name} line {node.lineno}")  # type: ignore[attr-defined]
    assert found == []


def test_only_ranks_reads_the_environment_of_the_launcher():
    """No function or statement elsewhere has both the environment and one of the launcher's names in it."""
    found = [
        f"{name} line {statement.lineno}"
        for name, source in sources().items()
        if name != "ranks"
        for statement in source.tree.body
        if re.search(r"\b(environ|getenv)\b", ast.unparse(statement))
        if {node.value for node in ast.walk(statement) if isinstance(node, ast.Constant)} & LAUNCHER
    ]
    assert found == []


def test_kernels_know_tensors_and_nothing_else():
    known = sources()
    foreign = {
        each.module
        for name in known
        if name.startswith("kernels.")
        for each in imports(known[name], known)
        if room(each.module) in HEAVY - {"torch"} or each.module.endswith(("arguments", "settings"))
    }
    assert foreign == set()


# The checks themselves, on a house with one fault each.


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("data/store.py", "def load():\n    from burnish.train.trainer import Trainer", "data.store imports up"),
        ("data/store.py", "from burnish.chat import template", "data.store imports sideways"),
        ("model/arguments.py", "from burnish.model import head", "model.arguments imports up"),
        ("errors.py", "import burnish.console, burnish.cli", "errors imports up: cli"),
        (
            "chat/template.py",
            "import importlib\nimportlib.import_module('burnish.workflow')",
            "chat.template imports up",
        ),
    ],
)
def test_a_fault_in_the_house_is_found(tmp_path, file, text, fault):
    for room_file in ("data/store.py", "train/trainer.py", "chat/template.py", "model/head.py", "model/arguments.py"):
        (tmp_path / PACKAGE / room_file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / PACKAGE / room_file).touch()
    for ground_file in ("errors.py", "console.py", "cli.py", "workflow.py"):
        (tmp_path / PACKAGE / ground_file).touch()
    assert climbing(sources(tmp_path)) == []
    (tmp_path / PACKAGE / file).write_text(text)
    (found,) = climbing(sources(tmp_path))
    assert fault in found


def test_a_circle_is_found_and_one_for_types_alone_is_none(tmp_path):
    house = tmp_path / PACKAGE
    house.mkdir()
    (house / "errors.py").write_text("def late():\n    import burnish.console")
    (house / "console.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import burnish.errors")
    assert circles(sources(tmp_path)) == []
    (house / "console.py").write_text("import burnish.errors")
    assert circles(sources(tmp_path)) == ["console -> errors -> console"]
