"""HTTP to a worker over its unix socket. Owns the transport and the token header, not what is asked."""

from __future__ import annotations

import httpx

from firebox.wire.worker import WORKER_TOKEN_HEADER, WorkerAddress


async def ask(address: WorkerAddress, method: str, path: str, body: bytes | None, *, timeout_s: float) -> bytes:
    """The body of the worker's 200 answer; raises httpx.HTTPError when it is gone, refuses or takes too long."""
    # A unix socket has no TLS: without this, each transport would read all certificates of this machine first.
    transport = httpx.AsyncHTTPTransport(uds=address.socket, verify=False)
    headers = {WORKER_TOKEN_HEADER: address.token}
    async with httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=timeout_s) as client:
        answer = await client.request(method, path, content=body, headers=headers)
        answer.raise_for_status()
        return answer.content
