"""The size ratchet: numbers that may only shrink.

`LIMITS` is what new code keeps to. `ALLOWED` lists today's exceptions with their exact size; a smaller reality must
be written down here, so an exception can shrink and vanish, never grow.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

LIMITS = {"file": 400, "function": 60, "route file": 220, "recipe": 300, "constructor parameters": 8}
MAX_CONFIG_FIELDS = 20
MAX_PUBLIC_NAMES = 25
PAGE_NAMES = {"InfraConfig", "DeployConfig", "WeightSyncConfig", "WandBConfig", "ReconnectableClient"}

ALLOWED: dict[tuple[str, str], int] = {}


def _lines(node: ast.AST) -> int:
    return (getattr(node, "end_lineno", 0) or 0) - getattr(node, "lineno", 0) + 1


def _constructor_parameters(function: ast.FunctionDef) -> int:
    return len(function.args.posonlyargs + function.args.args + function.args.kwonlyargs) - 1


def _kind_of_file(name: str) -> str:
    if name.startswith("firebox/control/routes/"):
        return "route file"
    return "recipe" if name.startswith("training/recipes/") else "file"


def measured(root: Path) -> Iterator[tuple[str, str, int]]:
    """(kind, place, size) of every file, function and constructor of the packages under `root`."""
    for path in sorted([*root.glob("firebox/**/*.py"), *root.glob("training/**/*.py")]):
        name = str(path.relative_to(root))
        text = path.read_text()
        yield _kind_of_file(name), name, text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield "function", f"{name}:{node.name}", _lines(node)
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                yield "constructor parameters", f"{name}:{node.lineno}", _constructor_parameters(node)


def oversized(root: Path) -> dict[tuple[str, str], int]:
    return {(kind, place): size for kind, place, size in measured(root) if size > LIMITS[kind]}


def test_nothing_outgrows_its_limit() -> None:
    assert oversized(ROOT) == ALLOWED


def test_recipe_configs_stay_small() -> None:
    for path in sorted(ROOT.glob("training/recipes/*_loop.py")):
        config = importlib.import_module(f"training.recipes.{path.stem}").Config
        names = [field.name for field in dataclasses.fields(config)]
        assert len(names) <= MAX_CONFIG_FIELDS, f"{path.name}: {len(names)} fields: {names}"


def test_public_names_stay_few() -> None:
    names = set(importlib.import_module("training.utils").__all__)
    assert names >= PAGE_NAMES
    assert len(names - PAGE_NAMES) <= MAX_PUBLIC_NAMES


def test_ratchet_notices_a_long_function(tmp_path: Path) -> None:
    folder = tmp_path / "firebox"
    folder.mkdir()
    (folder / "long.py").write_text("def long() -> None:\n" + "    pass\n" * 60)
    assert oversized(tmp_path) == {("function", "firebox/long.py:long"): 61}
