"""A registered model as a directory of the user's own, which the public libraries load as it is."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from pathlib import Path

from firebox.cli.client import Client
from firebox.control.layout import Layout
from firebox.wire.errors import AlreadyExists

_ADAPTER_CONFIG = "adapter_config.json"


def export(client: Client, layout: Layout, name: str, target: Path) -> str | None:
    """Copy the model `name` to `target`, all of it or nothing.

    An adapter names its base model by hub name, or else by its directory here; that is returned. Raises AlreadyExists
    when `target` is there.
    """
    model = client.own("GET", f"models/{name}")
    if target.exists():
        raise AlreadyExists(f"{target} exists already; name a new directory")
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, scratch, ignore_errors=True)
        shutil.copytree(layout.model(client.account, name), scratch)
        base = (
            _name_base(client, layout, scratch, model["peftDetails"]["baseModel"]) if "peftDetails" in model else None
        )
        scratch.rename(target)
    return base


def _name_base(client: Client, layout: Layout, adapter: Path, base_model: str) -> str:
    base = client.ask("GET", f"/v1/{base_model}")
    known = str(base["aliases"][0] if base.get("aliases") else layout.model(client.account, base_model.split("/")[-1]))
    config = json.loads((adapter / _ADAPTER_CONFIG).read_text())
    config["base_model_name_or_path"] = known
    (adapter / _ADAPTER_CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    return known
