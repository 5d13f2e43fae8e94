"""Run the comparisons and keep their figures: `python -m benchmarks [NAME ...]`, all of them without a name."""

from __future__ import annotations

import argparse
import importlib
import os
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != "harness")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios against peers, side by side.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones: {', '.join(NAMES)}")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both sides (default 1)")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(NAMES)}")

    import torch
    from transformers.utils import logging

    from benchmarks.harness import keep

    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
    print(f"{'':<58} {'ours':>12} {'theirs':>12}   ratio")
    for name in arguments.names or NAMES:
        comparisons = importlib.import_module(f"benchmarks.{name}").run()
        print(*comparisons, sep="\n", flush=True)
        print(f"  -> {keep(name, comparisons)}")


if __name__ == "__main__":
    main()
