"""The commands that manage API keys. They take an operator's key, such as the first one."""

from __future__ import annotations

from typing import Annotated

import typer

from firebox.cli.options import DEFAULT_DATA_DIR, AsJson, DataDir, connect
from firebox.cli.tables import show

keys_app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)

OfAccount = Annotated[str, typer.Option("--account", help="Whose key; empty for the account of your own key.")]


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What the key is for, to tell it from others.")],
    account: Annotated[str, typer.Option(help="Whose key; a new account begins with it. Empty: your own.")] = "",
    requests_per_minute: Annotated[int | None, typer.Option(help="No more than this.", min=1)] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="No more requests open at a time.", min=1)] = None,
    operator: Annotated[bool, typer.Option("--operator", help="Let it manage keys, too.")] = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Make a key, which is shown this once. Example: firebox keys create laptop --account alice"""
    client = connect(data_dir)
    body = {
        "displayName": name,
        "requestsPerMinute": requests_per_minute,
        "maxConcurrent": max_concurrent,
        "operator": operator,
    }
    made = client.ask("POST", f"/v1/accounts/{account or client.account}/apiKeys", json=body)
    print(f"{made['name']}, shown only now:")
    print(made["secret"])


@keys_app.command("list")
def list_keys(account: OfAccount = "-", data_dir: DataDir = DEFAULT_DATA_DIR, as_json: AsJson = False) -> None:
    """Keys of every account, or of one. Example: firebox keys list --account alice"""
    client = connect(data_dir)
    rows = client.every("apiKeys", "apiKeys", account=account)
    for row in rows:
        row["account"] = row["name"].split("/")[1]
    columns = {"key": "name", "account": "account", "for": "displayName", "state": "state", "used": "lastUsedTime"}
    limits = {"per minute": "requestsPerMinute", "at once": "maxConcurrent", "operator": "operator"}
    show(rows, columns | limits, as_json)


@keys_app.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(help="Id of the key, see firebox keys list.")],
    account: OfAccount = "",
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Let nobody in with this key any more. Example: firebox keys revoke 1f2e3d4c --account alice"""
    client = connect(data_dir)
    revoked = client.ask("DELETE", f"/v1/accounts/{account or client.account}/apiKeys/{key}")
    print(f"{revoked['name']} is revoked")
