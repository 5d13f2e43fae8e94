"""Rules about the text of the project: what is never written, and documents that must match the code."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PICKLE_ALLOWED = {"firebox/trainer/checkpoint.py"}
TRACKED = [
    ROOT / line
    for line in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    if (ROOT / line).is_file()
]
SOURCES = [
    path for path in TRACKED if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("firebox", "training")
]
PAGES = [path for path in TRACKED if path.suffix == ".md"]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_pickle_stays_in_one_audited_file() -> None:
    pattern = re.compile(r"\b(import pickle|pickle\.loads?|torch\.load)\b")
    assert {_name(p) for p in SOURCES if pattern.search(p.read_text())} <= PICKLE_ALLOWED


def test_every_module_says_what_it_owns() -> None:
    silent = [_name(p) for p in SOURCES if p.stat().st_size and not ast.get_docstring(ast.parse(p.read_text()))]
    assert silent == []


def test_broad_handlers_give_a_reason() -> None:
    """`except Exception` is for process boundaries, and says why on the same line."""
    broad = re.compile(r"except (Base)?Exception\b(?!.*noqa: BLE001\s*[:\-—,;(]?\s*\w)")
    found = [
        f"{_name(p)}:{i}" for p in SOURCES for i, line in enumerate(p.read_text().splitlines(), 1) if broad.search(line)
    ]
    assert found == []


def test_no_unfinished_marks() -> None:
    marks = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"]) + r")\b|NotImplementedError")
    assert [_name(p) for p in SOURCES if marks.search(p.read_text())] == []


def test_test_modules_have_names_of_their_own() -> None:
    """Test folders are no packages, so two modules of one name cannot be collected together."""
    names = [p.name for p in TRACKED if _name(p).startswith("tests/") and p.suffix == ".py" and p.stem != "__init__"]
    assert sorted(n for n in set(names) if names.count(n) > 1 and n not in ("conftest.py", "__main__.py")) == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not t.startswith("mailto:") and not (page.parent / t).exists()]
    assert missing == []


def test_tour_names_every_room() -> None:
    rooms = {
        p.name for p in (ROOT / "firebox").iterdir() if p.is_dir() and p.name != "__pycache__" and any(p.glob("*.py"))
    }
    told = set(re.findall(r"`firebox/(\w+)/`", (ROOT / "docs" / "tour.md").read_text()))
    assert told == rooms


def test_readme_names_real_make_targets() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"`?make ([a-z]+)`?", text)) <= targets
