"""The front door on real sockets: who is let in, what is passed on, and what a lost worker looks like."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from firebox.gateway import guard
from firebox.gateway.app import build_app
from firebox.gateway.guard import allowed_hosts
from firebox.gateway.limits import Limits
from firebox.gateway.proxy import LookUps
from firebox.gateway.tinker import RootCalls
from firebox.wire.errors import FailedPrecondition, NotFound, ResourceExhausted
from firebox.wire.worker import WORKER_TOKEN_HEADER, WorkerAddress


class Known(NamedTuple):
    name: str
    account: str = "local"
    operator: bool = False
    requests_per_minute: int | None = None
    max_concurrent: int | None = None


KEY, RATED, NARROW = "fb_right", "fb_rated", "fb_narrow"
KEYS = {KEY: Known("k"), RATED: Known("r", requests_per_minute=3), NARROW: Known("n", max_concurrent=1)}
TICKET = "for-one-artifact"
OTHER_CALLS = [field.name for field in dataclasses.fields(RootCalls) if field.name != "trainer"]
WORKER = "/training/v1/rlorTrainerJobs/local/job"


async def show(request: Request) -> Response:
    body = await request.body()
    if request.url.path == "/api/v1/hang_up":
        raise RuntimeError("this worker breaks on every call")
    shown = {
        "path": request.url.path,
        "query": request.url.query,
        "size": len(body),
        "headers": dict(request.headers),
    }
    return JSONResponse(shown, status_code=418, headers={"x-worker": "1", "x-request-id": "the worker's own"})


async def stream(request: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        for number in range(3):
            yield b"data: %d\n\n" % number
            time.sleep(0.15)

    return StreamingResponse(parts(), media_type="text/event-stream")


async def crash(request: Request) -> Response:
    raise ZeroDivisionError("a bug in the control plane, with a secret")


def serve(app: Any, listener: socket.socket) -> tuple[uvicorn.Server, threading.Thread]:
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return server, thread


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = str(tmp_path_factory.mktemp("run") / "w.sock")
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(path)
    worker_app = Starlette(
        routes=[
            Route("/api/v1/stream", stream),
            Route("/{path:path}", show, methods=["GET", "POST", "DELETE"]),
        ]
    )
    here, gone = WorkerAddress(path, "secret"), WorkerAddress(str(Path(path).with_name("gone.sock")), "secret")

    async def trainer(account: str, job: str) -> WorkerAddress:
        if job == "failed":
            raise FailedPrecondition("the trainer ended; resume the job")
        if job not in ("job", "gone"):
            raise NotFound(f"trainer job {job!r} does not exist")
        return here if job == "job" else gone

    async def sampler(account: str, name: str) -> list[WorkerAddress]:
        if name == "accounts/local/deployments/half-gone":
            return [gone, here]
        if name != "accounts/local/deployments/d":
            raise NotFound(f"deployment {name!r} does not exist")
        return [here]

    @contextlib.asynccontextmanager
    async def life() -> AsyncIterator[None]:
        yield

    control = Starlette(
        routes=[Route("/v1/crash", crash), Route("/docs", show), Route("/v1/echo", show, methods=["POST"])]
    )
    app = build_app(
        control,
        LookUps(trainer, sampler),
        RootCalls(trainer=trainer, **dict.fromkeys(OTHER_CALLS, trainer)),
        KEYS.get,
        lambda ticket: "local" if ticket == TICKET else None,
        allowed_hosts("127.0.0.1"),
        life,
    )
    front = socket.create_server(("127.0.0.1", 0))
    running = [serve(worker_app, unix), serve(app, front)]
    yield f"http://127.0.0.1:{front.getsockname()[1]}"
    for server, thread in running[::-1]:
        server.should_exit = True
        thread.join(10)


def ask(base: str, method: str, path: str, **kwargs: Any) -> httpx.Response:
    headers = {"X-Api-Key": KEY, **kwargs.pop("headers", {})}
    return httpx.request(method, base + path, headers=headers, timeout=20, **kwargs)


PATHS = ["/v1/accounts", "/docs", "/openapi.json", "/v1/completions", f"{WORKER}/api/v1/healthz", "/", "/nowhere"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers", [{}, {"X-Api-Key": "fb_wrong"}, {"Authorization": "Bearer fb_"}, {"X-Api-Key": "é"}]
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_nothing_is_reached_without_a_key(base: str, path: str, headers: dict[str, str], method: str) -> None:
    raw = {name: value.encode() for name, value in headers.items()}
    answer = httpx.request(method, base + path, headers=raw)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == 16
    assert "FIREWORKS_API_KEY" in answer.json()["error"]["message"]
    assert answer.headers["x-request-id"]


def test_either_header_carries_the_key(base: str) -> None:
    assert httpx.get(f"{base}/docs", headers={"Authorization": f"Bearer {KEY}"}).status_code == 418
    assert httpx.get(f"{base}/docs", headers={"x-api-key": KEY}).status_code == 418


def test_browsers_are_asked_for_the_key_and_send_it_as_a_password(base: str) -> None:
    page = httpx.get(f"{base}/docs", headers={"Accept": "text/html"})
    assert (page.status_code, page.headers["www-authenticate"][:5]) == (401, "Basic")
    assert "www-authenticate" not in httpx.get(f"{base}/docs").headers
    assert httpx.get(f"{base}/docs", auth=("", KEY)).status_code == 418
    assert httpx.get(f"{base}/docs", auth=("", "fb_wrong")).status_code == 401
    assert httpx.get(f"{base}/docs", headers={"Authorization": "Basic !"}).status_code == 401


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "169.254.169.254", "", "localhost.evil"])
def test_foreign_host_names_are_refused(base: str, host: str) -> None:
    answer = ask(base, "GET", "/docs", headers={"Host": host})
    assert answer.status_code == 403
    assert "Host" in answer.json()["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]", "[::1]:80"])
def test_own_host_names_are_let_in(base: str, host: str) -> None:
    assert ask(base, "GET", "/docs", headers={"Host": host}).status_code == 418


def test_trainer_call_arrives_as_it_was_sent(base: str) -> None:
    body = b"\x00\xff" * 3_000_000
    answer = ask(
        base, "POST", f"{WORKER}/api/v1/forward?a=1&b=%2F", content=body,
        headers={"Content-Type": "application/x-protobuf", "X-Request-ID": "mine-1"},
    )  # fmt: skip
    seen = answer.json()
    assert (answer.status_code, answer.headers["x-worker"]) == (418, "1")
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    assert (seen["path"], seen["query"], seen["size"]) == ("/api/v1/forward", "a=1&b=%2F", len(body))
    assert seen["headers"]["content-type"] == "application/x-protobuf"
    assert seen["headers"]["x-request-id"] == "mine-1"
    assert seen["headers"][WORKER_TOKEN_HEADER] == "secret"
    assert "x-api-key" not in seen["headers"]


def test_chunked_body_is_streamed_up(base: str) -> None:
    def parts() -> Iterator[bytes]:
        yield from [b"x" * 100_000] * 20

    assert ask(base, "POST", f"{WORKER}/api/v1/forward", content=parts()).json()["size"] == 2_000_000


def test_answer_is_streamed_down_as_it_comes(base: str) -> None:
    times = []
    with httpx.stream("GET", f"{base}{WORKER}/api/v1/stream", headers={"X-Api-Key": KEY}) as answer:
        for _ in answer.iter_raw():
            times.append(time.monotonic())
    assert times[-1] - times[0] > 0.2


@pytest.mark.parametrize(
    ("path", "arrives"),
    [
        ("/inference/v1/completions", "/v1/completions"),
        ("/inference/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/completions", "/v1/completions"),
        ("/v1/chat/completions", "/v1/chat/completions"),
    ],
)
def test_completion_goes_to_the_deployment_in_its_body(base: str, path: str, arrives: str) -> None:
    body = {"prompt": [1] * 1000, "model": "accounts/local/deployments/d", "stream": True}
    seen = ask(base, "POST", path, json=body).json()
    assert seen["path"] == arrives
    assert seen["size"] > 1000


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"[]", 400),
        (b'{"prompt": [1]}', 400),
        (b'{"model": 5}', 400),
        (b'{"model": "\xff"}', 400),
        (b'{"model": "accounts/local/deployments/x"}', 404),
    ],
)
def test_completion_that_names_no_deployment_is_refused(base: str, content: bytes, status: int) -> None:
    answer = ask(base, "POST", "/inference/v1/completions", content=content)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_worker_that_is_gone_is_unavailable_and_ends_the_wait_for_futures(base: str) -> None:
    gone = WORKER.replace("/job", "/gone")
    answer = ask(base, "POST", f"{gone}/api/v1/forward", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, 14)
    future = ask(base, "POST", f"{gone}/api/v1/retrieve_future", json={})
    assert (future.status_code, future.json()["category"]) == (200, "server")
    failed = WORKER.replace("/job", "/failed")
    future = ask(base, "POST", f"{failed}/api/v1/retrieve_future", json={})
    assert future.json() == {"error": "the trainer ended; resume the job", "category": "user"}
    assert ask(base, "POST", f"{failed}/api/v1/telemetry", json={}).json() == {"status": "accepted"}
    assert ask(base, "POST", f"{WORKER}x/api/v1/retrieve_future", json={}).status_code == 404


def test_worker_only_paths_are_not_public(base: str) -> None:
    for path in ("worker/status", "worker/hotload", "%77orker/hotload", "/worker/hotload", "api/../worker/hotload"):
        answer = ask(base, "POST", f"{WORKER}/{path}", json={})
        assert "path" not in answer.json() or not answer.json()["path"].startswith("/worker"), path


def test_bug_behind_the_gateway_is_an_answer_without_its_secrets(base: str) -> None:
    answer = ask(base, "GET", "/v1/crash", headers={"X-Request-ID": "find-me"})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == "find-me"
    assert ask(base, "GET", "/docs").status_code == 418


def test_body_beyond_the_limit_is_refused(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 1000)
    assert ask(base, "POST", "/v1/echo", content=b"x" * 1000).status_code == 418
    assert ask(base, "POST", "/v1/echo", content=b"x" * 1001).status_code == 413
    assert ask(base, "POST", f"{WORKER}/api/v1/forward", content=iter([b"x" * 600] * 2)).status_code == 413


def test_odd_request_ids_are_replaced(base: str) -> None:
    answer = ask(base, "GET", "/docs", headers={"X-Request-ID": "a b\tc"})
    assert len(answer.headers["x-request-id"]) == 32


def test_ticket_opens_downloads_only(base: str, caplog: pytest.LogCaptureFixture) -> None:
    download = f"{base}/api/v1/downloads/{TICKET}/file"
    with caplog.at_level("INFO", "firebox"):
        httpx.get(download)
        deadline = time.monotonic() + 5
        while "/api/v1/downloads/..." not in caplog.text:  # a request is logged after its answer
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert TICKET not in caplog.text
    assert httpx.get(download).status_code == 404, "let in, and this control plane has no such file"
    assert httpx.post(download).status_code == 401
    assert httpx.get(download.replace(TICKET, "another")).status_code == 401
    assert httpx.get(f"{base}/v1/echo", headers={"X-Api-Key": TICKET}).status_code == 401
    assert httpx.get(f"{base}/api/v1/healthz/{TICKET}").status_code == 401


@pytest.mark.parametrize(
    "origin", ["null", "http://evil.example", "http://localhost.evil.example:80", "http://a@x", ""]
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_pages_of_others_are_refused(base: str, origin: str, method: str) -> None:
    answer = ask(base, method, "/docs", headers={"Origin": origin})
    assert answer.status_code == 403
    assert answer.json()["error"]["details"][0]["reason"] == "ORIGIN_NOT_ALLOWED"


def test_own_pages_are_let_in(base: str) -> None:
    for origin in (base, "http://localhost:3000", "https://[::1]:1"):
        assert ask(base, "GET", "/docs", headers={"Origin": origin}).status_code == 418


def test_web_sockets_are_refused(base: str) -> None:
    upgrade = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }  # fmt: skip
    for path in PATHS:
        assert httpx.get(base + path, headers=upgrade).status_code in (401, 403), path


def test_key_with_a_rate_is_told_when_to_come_back(base: str) -> None:
    codes = [ask(base, "GET", "/docs", headers={"X-Api-Key": RATED}) for _ in range(5)]
    assert [answer.status_code for answer in codes] == [418] * 3 + [429] * 2
    assert codes[-1].json()["error"]["details"][0]["reason"] == "TOO_MANY_REQUESTS"
    assert 50 < int(codes[-1].headers["retry-after"]) <= 60
    waits = ask(base, "POST", f"{WORKER}/api/v1/retrieve_future", json={}, headers={"X-Api-Key": RATED})
    assert waits.status_code == 418, "waiting for what was asked before is not counted"


def test_key_has_so_many_requests_open_at_a_time(base: str) -> None:
    slow = {"X-Api-Key": NARROW}
    with httpx.stream("GET", f"{base}{WORKER}/api/v1/stream", headers=slow) as first:
        refused = ask(base, "GET", "/docs", headers=slow)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        first.read()
    assert ask(base, "GET", "/docs", headers=slow).status_code == 418


def test_limits_count_exactly() -> None:
    now = [0.0]
    limits, key = Limits(lambda: now[0]), Known("k", requests_per_minute=2)

    def asked(at: float) -> bool:
        now[0] = at
        try:
            with limits.slot(key):
                return True
        except ResourceExhausted:
            return False

    assert [asked(t) for t in (0, 10, 20, 59.9, 60, 61, 70, 119.9, 120)] == [
        True, True, False, False, True, False, True, False, True
    ]  # fmt: skip


def test_request_goes_to_another_replica_when_one_is_gone(base: str) -> None:
    for number in range(8):  # whichever of the two a prompt belongs to; this worker says 418 to everything
        body = {"model": "accounts/local/deployments/half-gone", "prompt": [number]}
        assert ask(base, "POST", "/v1/completions", json=body).status_code == 418
