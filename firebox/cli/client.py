"""How a command finds and asks the server: the environment first, then the data directory of this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from firebox.control.layout import Layout
from firebox.wire.errors import FailedPrecondition

_TIMEOUT_S = 120.0


class Client:
    """The control plane as one account sees it. Every call raises FailedPrecondition with the server's own words."""

    def __init__(self, data_dir: Path) -> None:
        self.layout = Layout(data_dir.expanduser().resolve())
        self.url, key = _find(self.layout)
        self._http = httpx.Client(base_url=self.url, headers={"X-Api-Key": key, "Prefer": "wait=0"}, timeout=_TIMEOUT_S)
        self.account = str(self.ask("GET", "/v1/accounts")["accounts"][0]["name"]).rpartition("/")[2]

    def ask(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, **kwargs)
        except httpx.HTTPError as error:
            raise FailedPrecondition(f"no server answers at {self.url} ({error}); start one: firebox up") from error
        if not answer.is_success:
            raise FailedPrecondition(_message(answer))
        body: dict[str, Any] = answer.json()
        return body

    def own(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        """`ask` below the account's own path."""
        return self.ask(method, f"/v1/accounts/{self.account}/{path}", **kwargs)

    @property
    def is_local(self) -> bool:
        """Whether the data directory that was named is the one of the server that answers."""
        try:
            serving: str = json.loads(self.layout.server_file.read_text())["url"]
        except FileNotFoundError:
            return False
        return serving.rstrip("/") == self.url.rstrip("/")

    def files(self) -> Layout:
        """The server's own files. Raises FailedPrecondition when the data directory is not that of the server.

        Weights do not travel over the wire: the command and the server must share a file system.
        """
        if not self.is_local:
            raise FailedPrecondition(
                f"the server at {self.url} does not keep its data in {self.layout.root}; name the directory it was "
                "started with, on its own machine: --data-dir DIR or FIREBOX_DATA_DIR"
            )
        return self.layout

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[str]:
        """The lines of a streamed answer."""
        with self._http.stream("POST", path, json=body) as answer:
            if not answer.is_success:
                answer.read()
                raise FailedPrecondition(_message(answer))
            yield from answer.iter_lines()

    def every(self, path: str, key: str, *, account: str = "", **params: str) -> list[dict[str, Any]]:
        """All pages of a listing, of the account itself unless another one is named."""
        found: list[dict[str, Any]] = []
        token = ""
        while True:
            url = f"/v1/accounts/{account or self.account}/{path}"
            page = self.ask("GET", url, params={"pageSize": "200", "pageToken": token, **params})
            found += page[key]
            token = page.get("nextPageToken", "")
            if not token:
                return found


def _find(layout: Layout) -> tuple[str, str]:
    url, key = os.environ.get("FIREWORKS_BASE_URL"), os.environ.get("FIREWORKS_API_KEY")
    if url and key:
        return url, key
    try:
        return json.loads(layout.server_file.read_text())["url"], layout.api_key.read_text().strip()
    except FileNotFoundError:
        raise FailedPrecondition(
            f"no server runs on {layout.root}; start one with firebox up, name its directory with --data-dir, or set "
            "FIREWORKS_BASE_URL and FIREWORKS_API_KEY"
        ) from None


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {answer.status_code} from {answer.url}: {answer.text[:200]}"
