"""Run one training life through several generations of both clients and write down which endpoints work.

    python tests/compat            (make compat)

Every generation is the genuine wheel, installed without its dependencies into an environment of its own under a
temporary directory; what it depends on comes from this environment. Writes docs/reference/compat.md, and ends with
status 1 when an endpoint failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "compat.md"
LIFE_S = 300

sys.path.insert(0, str(ROOT / "tests"))


class Generation(NamedTuple):
    """One column of the table; no version means the newest the index offers."""

    sdk: str
    packages: list[str]


GENERATIONS = [
    Generation("fireworks", ["fireworks-ai==1.2.9", "tinker==0.23.0"]),
    Generation("fireworks", ["fireworks-ai"]),
    Generation("tinker", ["tinker==0.23.0"]),
    Generation("tinker", ["tinker==0.25.0"]),
    Generation("tinker", ["tinker"]),
]


def install(generation: Generation, directory: Path) -> Path:
    """Make an environment with these wheels before everything else; returns its Python."""
    venv.create(directory, with_pip=False)
    own = directory / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = directory / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--ignore-installed", *generation.packages], check=True, timeout=300)
    return python


def versions(python: Path, generation: Generation) -> str:
    names = [package.partition("==")[0] for package in generation.packages]
    code = f"import importlib.metadata as m; print(', '.join(f'{{n}} {{m.version(n)}}' for n in {names}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def live(python: Path, sdk: str, work: Path) -> dict[str, str]:
    """Every endpoint's verdict, from a trainer of this generation's own."""
    from trainer_harness import BASE_MODEL, serving, trainer_spec

    environment = os.environ | {"TINKER_TELEMETRY": "0", "PYTHONPATH": ""}
    with serving(trainer_spec(work / "tiny", work, job=python.parents[1].name, lora_rank=8)) as url:
        command = [python, str(Path(__file__).with_name("life.py")), sdk, url, BASE_MODEL]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIFE_S, env=environment, check=False)
    if done.returncode:
        return {"create_session, create_model": f"the client ended with {done.returncode}: {done.stderr[-300:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def page(table: dict[str, dict[str, str]]) -> str:
    endpoints = list(dict.fromkeys(endpoint for column in table.values() for endpoint in column))
    lines = [
        "# Client generations",
        "",
        "Written by `make compat`: one training life (LoRA, rank 4) through the genuine wheels, each in its own",
        "environment, against a trainer's own endpoint. A dash means that the generation has no such call.",
        "",
        "| endpoint | " + " | ".join(table) + " |",
        "|---" * (len(table) + 1) + "|",
        *(
            f"| {e} | "
            + " | ".join("ok" if c.get(e) == "ok" else "failed" if e in c else "-" for c in table.values())
            + " |"
            for e in endpoints
        ),
    ]
    failures = [f"- {name}, {e}: {told}" for name, c in table.items() for e, told in c.items() if told != "ok"]
    return "\n".join([*lines, *(["", "Failures:", "", *failures] if failures else [])]) + "\n"


def main() -> int:
    from firebox.modeling.tiny import make_tiny

    table: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="firebox-compat-") as root:
        work = Path(root)
        make_tiny(work / "tiny")
        for i, generation in enumerate(GENERATIONS):
            python = install(generation, work / f"generation-{i}")
            name = versions(python, generation)
            table[name] = live(python, generation.sdk, work)
            print(f"{name}: {sum(told == 'ok' for told in table[name].values())} of {len(table[name])} ok", flush=True)
    PAGE.write_text(page(table))
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return int(any(told != "ok" for column in table.values() for told in column.values()))


if __name__ == "__main__":
    sys.exit(main())
