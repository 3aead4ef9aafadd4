"""The house's rule on imports, read from the source: they go down only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hieratok

PACKAGE = Path(hieratok.__file__).parent
# A room may import what stands to the right of it on its own line, or anything on the lines below; never above.
ORDER = [["__main__"], ["cli"], ["quickstart"], ["testbed", "report"], ["training", "generation", "evaluation"],
         ["engine"], ["losses", "data"], ["models"], ["config"], ["files"], ["errors"]]  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def imports_of(path: Path) -> set[str]:
    """The rooms of this package that a file imports while it runs; imports for type checkers do not count."""
    here = ("hieratok", *path.relative_to(PACKAGE).with_suffix("").parts)
    tree = ast.parse(path.read_text())
    for_checkers = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    rooms = set()
    for node in ast.walk(tree):
        if id(node) in for_checkers:
            continue
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            base = ".".join(here[: -node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("hieratok.")}
    return rooms & set(LEVEL)


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py" or path.parent != PACKAGE]


@pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(PACKAGE)) for p in MODULES])
def test_imports_go_down_only(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in LEVEL, f"{room} has no place in the order of rooms"
    up = {other for other in imports_of(path) if other != room and LEVEL[other] <= LEVEL[room]}
    assert not up, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(up))}"


def test_the_reader_of_imports_sees_them():
    assert {"data", "engine", "models", "losses"} <= imports_of(PACKAGE / "training" / "tokenizer.py")


def test_models_know_nothing_but_themselves_configuration_and_errors():
    for path in (PACKAGE / "models").glob("*.py"):
        assert imports_of(path) <= {"models", "config", "files", "errors"}


def test_nothing_unpickles():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "joblib", "shelve"}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path
