"""Writes the pages of docs/reference that are made from the cookbook's code. `make docs` runs it.

Owns their layout; every name, type, default and explanation is read from the classes. Invariant: the same code gives
the same text, so that a test can compare.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Lt

from training.utils import (
    DeployConfig,
    InfraConfig,
    OptimConfig,
    PolicyConfig,
    ReconnectableClient,
    RolloutConfig,
    RunConfig,
    WandBConfig,
    WeightSyncConfig,
)

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Made by `make docs` from the code. -->"
SHARED = [InfraConfig, DeployConfig, WeightSyncConfig, WandBConfig, RunConfig, OptimConfig, RolloutConfig, PolicyConfig]
RECIPES = ["sft_loop", "dpo_loop", "orpo_loop", "rl_loop"]
BOUNDS = {Ge: ("ge", ">="), Gt: ("gt", ">"), Lt: ("lt", "<")}
# The comment behind a field; a default may itself hold a `#` only inside quotes, which none does.
FIELD = re.compile(r"^    (\w+): .*?  # (.+)$", re.MULTILINE)


def pages() -> dict[str, str]:
    """Every generated page by its file name."""
    return {"configuration.md": configuration(), "client.md": client(), "recipes.md": recipes()}


CONFIGURATION = """\
Settings that recipes share, as dataclasses of `training.utils`. A field is checked when the object is made and again by
`validate` before anything is created, since fields may be assigned. `TrainerConfig` is another name of `InfraConfig`.
On a command line the field `region` of `infra` is `--infra.region`; the fields of `RunConfig` have no prefix:
`--dry-run`. [Runs](runs.md) tells what they do together."""
RECIPE = """\
The settings of each recipe; `python -m training.recipes.NAME --help` shows them, too. A class in the column of types is
on [the page of shared settings](configuration.md), or below."""


def configuration() -> str:
    return page("Configuration", CONFIGURATION, *(table(cls) for cls in SHARED))


def recipes() -> str:
    parts = []
    for name in RECIPES:
        module = import_module(f"training.recipes.{name}")
        own = [
            cls
            for hint in typing.get_type_hints(module.Config).values()
            if (cls := nested(hint)) not in [*SHARED, None]
        ]
        parts += [table(module.Config, f"`{name}`"), *(table(cls, f"`{name}`: {cls.__name__}") for cls in own)]
    return page("Recipes", RECIPE, *parts)


def client() -> str:
    members = {
        name: member
        for name, member in vars(ReconnectableClient).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    }
    parameters = [
        row(f"`{p.name}`", f"`{p.annotation}`", "" if p.default is p.empty else f"`{p.default!r}`", p.kind.description)
        for p in inspect.signature(ReconnectableClient).parameters.values()
    ]
    properties = [row(f"`{n}`", said(m)) for n, m in members.items() if isinstance(m, property)]
    methods = [row(f"`{n}{signature(m)}`", said(m)) for n, m in members.items() if inspect.isfunction(m)]
    return page(
        "ReconnectableClient",
        inspect.cleandoc(ReconnectableClient.__doc__ or ""),
        "\n".join(["## Constructor", "", row("parameter", "type", "default", "kind"), row(*["---"] * 4), *parameters]),
        "\n".join(["## Properties", "", row("property", "meaning"), row("---", "---"), *properties]),
        "\n".join(["## Methods", "", row("method", "meaning"), row("---", "---"), *methods]),
    )


def page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", NOTE, *parts]) + "\n"


def table(cls: Any, title: str | None = None) -> str:
    """All fields of a dataclass with what their comments say. Raises ValueError for one without."""
    hints, comments = typing.get_type_hints(cls, include_extras=True), dict(FIELD.findall(inspect.getsource(cls)))
    if missing := [field.name for field in fields(cls) if field.name not in comments and not nested(hints[field.name])]:
        raise ValueError(f"{cls.__module__}.{cls.__name__}: fields without a comment: {', '.join(missing)}")
    rows = [
        row(f"`{f.name}`", kind(hints[f.name]), default(f), comments.get(f.name) or said(nested(hints[f.name])))
        for f in fields(cls)
    ]
    head = [row("field", "type", "default", "meaning"), row(*["---"] * 4)]
    return "\n".join([f"## {title or cls.__name__}", "", inspect.cleandoc(cls.__doc__), "", *head, *rows])


def nested(hint: Any) -> Any:
    """The dataclass that a hint stands for, if it does."""
    bare = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    return bare if is_dataclass(bare) else None


def kind(hint: Any) -> str:
    """A type as a reader sees it: bounds behind it, None at the end."""
    if (cls := nested(hint)) is not None:
        return f"{cls.__name__}"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        bounds = [f"{BOUNDS[type(m)][1]} {getattr(m, BOUNDS[type(m)][0])}" for m in arguments[1:] if type(m) in BOUNDS]
        return " ".join([kind(arguments[0]), ", ".join(bounds)]).strip()
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind(part) for part in arguments)
    if origin is typing.Literal:
        # Sorted: python keeps the first of two equal unions, whatever order its values were written in.
        return ", ".join(f"`{value}`" for value in sorted(arguments))
    if origin is not None and "Callable" in str(origin):
        return "function"
    return "None" if hint is type(None) else f"`{hint if origin else hint.__name__}`"


def default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is MISSING:
        return "required"
    made = field.default_factory()
    usual = type(made)()
    changed = {f.name: value for f in fields(made) if (value := getattr(made, f.name)) != getattr(usual, f.name)}
    return ", ".join(f"`{name}={value!r}`" for name, value in changed.items())


def signature(function: Any) -> str:
    shown = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    return str(inspect.Signature(shown[1:]))


def said(thing: Any) -> str:
    """The first sentence of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def main() -> None:
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
