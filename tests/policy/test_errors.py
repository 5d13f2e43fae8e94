"""The catalogue of errors lists every reason the code can give, with its status and side, and no other."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from firebox.wire import errors

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"\| `([A-Z_]+)` \| ([\d/]+) \| (you|server) \| (.+) \| (.+) \|")


def raised() -> dict[str, set[int]]:
    """Reason to the statuses it comes with, read from the sources."""
    found: dict[str, set[int]] = defaultdict(set)
    for kind in errors.FireboxError.__subclasses__():
        found[kind.default_reason].add(kind.status)
    for path in sorted((ROOT / "firebox").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                kind = getattr(errors, getattr(node.func, "id", ""), None)
                reasons = [
                    k.value.value for k in node.keywords if k.arg == "reason" and isinstance(k.value, ast.Constant)
                ]
                for reason in reasons if kind is not None else ():
                    found[reason].add(kind.status)
    return found


def test_catalogue_of_errors_is_complete() -> None:
    rows = [
        match.groups()
        for match in map(ROW.fullmatch, (ROOT / "docs/reference/errors.md").read_text().splitlines())
        if match
    ]
    told = {reason: ({int(s) for s in status.split("/")}, side) for reason, status, side, _, _ in rows}
    assert len(told) == len(rows), "a reason is listed twice"
    wanted = {reason: (statuses, "server" if min(statuses) >= 500 else "you") for reason, statuses in raised().items()}
    assert told == wanted, "docs/reference/errors.md: a line per reason: `| reason | HTTP | side | meaning | fix |`"
    assert all(len(meaning) > 10 and len(fix) > 3 for *_, meaning, fix in rows)
