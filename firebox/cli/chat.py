"""`firebox chat`: a conversation with a deployment, streamed to the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from firebox.cli.options import DEFAULT_DATA_DIR, DataDir, connect


def chat(
    deployment: Annotated[str, typer.Argument(help="Id of a deployment, see firebox deployments.")],
    message: Annotated[str, typer.Option("--message", "-m", help="Ask this alone, and end.")] = "",
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1)] = 512,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Talk to a deployment; an empty line ends it. Example: firebox chat my-deployment -m 'Who are you?'"""
    client = connect(data_dir)
    messages = [{"role": "system", "content": system}] if system else []
    settings = {
        "model": f"accounts/{client.account}/deployments/{deployment}",
        "temperature": temperature,
        "max_tokens": max_tokens,
        "stream": True,
    }
    while said := message or _line():
        messages.append({"role": "user", "content": said})
        answer = ""
        for part in _parts(client.stream("/v1/chat/completions", settings | {"messages": messages})):
            print(part, end="", flush=True)
            answer += part
        print()
        messages.append({"role": "assistant", "content": answer})
        if message:
            break


def _line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _parts(lines: Iterator[str]) -> Iterator[str]:
    """The text of a streamed answer, piece by piece; raises FailedPrecondition when the server breaks it off."""
    from firebox.wire.errors import FailedPrecondition

    for line in lines:
        data = line.removeprefix("data: ")
        if not line.startswith("data: ") or data == "[DONE]":
            continue
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            raise FailedPrecondition(event["error"]["message"])
        for choice in event["choices"]:
            yield choice["delta"].get("content") or ""
