"""Names that are paths, URLs or tricks, wherever a name is taken: none leaves its folder, none is fetched."""

from __future__ import annotations

import http.client
import itertools
import json
import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from control_harness import Server  # type: ignore[import-not-found]
from proofs import Record, count

from firebox.wire import tinker
from firebox.wire.errors import FireboxError
from firebox.wire.names import check_id, check_model_id, check_snapshot_id, parse_state_ref, split_resource

CANARY = "canary-7d1f"
SEPARATORS = ["/", "\\", "%2f", "%252f", "%5c", "%c0%af", "%e2%88%95", "\u2215", "\uff0f", "//", "/./", "/%00/"]
UPS = ["..", "%2e%2e", ".%2e", "%252e%252e", "..;", "...", "\uff0e\uff0e", ".. ", "..\t"]


def payloads(targets: list[str], port: int) -> list[str]:
    """At least 500: climbing by every spelling to every target, absolute names, devices, URLs of every scheme."""
    climbing = [
        (up + separator) * depth + target
        for up, separator, depth, target in itertools.product(UPS, SEPARATORS, (1, 3, 8), targets)
    ]
    absolute = [
        f"{prefix}{target}" for prefix in ("/", "//", "/./", "file://", "file:///", "\\\\?\\") for target in targets
    ]
    hosts = [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "2130706433",
        "0x7f000001",
        "127.1",
        "a@127.0.0.1",
    ]
    urls = [f"{scheme}://{host}:{port}/x" for scheme in ("http", "https", "ftp", "s3", "gs", "hf") for host in hosts]
    urls += ["http://169.254.169.254/latest/meta-data/", "//169.254.169.254/x", "\\\\127.0.0.1\\share\\x"]
    odd = [
        ".",
        "..",
        "~",
        "~root",
        "$HOME",
        "`id`",
        "$(id)",
        "a\0b",
        "a\nb",
        "-rf",
        "*",
        "CON",
        "a" * 300,
        "\u202e",
        ".git",
    ]
    tinker_paths = [f"tinker://{climb}" for climb in climbing[::9]]
    return list(dict.fromkeys([*climbing, *absolute, *urls, *odd, *tinker_paths]))


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Whoever connects here fetched a URL that a client named."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that no request may read from or write to."""
    (tmp_path / "canary").write_text(CANARY)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": CANARY}))
    return tmp_path


Place = Callable[[str], tuple[str, str, dict[str, Any] | None, dict[str, str]]]
"""A payload to (method, path, body, headers)."""

OWN = "/v1/accounts/local"
BASE = "accounts/local/models/tiny"
HERE = "<>"


def in_path(method: str, template: str) -> Place:
    def place(payload: str) -> tuple[str, str, dict[str, Any] | None, dict[str, str]]:
        return method, template.format(quote(payload, safe="/%")), None, {}

    return place


def in_body(path: str, /, **fields: Any) -> Place:
    def place(payload: str) -> tuple[str, str, dict[str, Any] | None, dict[str, str]]:
        return "POST", path, json.loads(json.dumps(fields).replace(json.dumps(HERE), json.dumps(payload))), {}

    return place


def in_header(payload: str) -> tuple[str, str, dict[str, Any] | None, dict[str, str]]:
    name = quote(payload, safe="/%:@[]")
    source = {"fireworks-deployment": name, "x-fireworks-hot-load-source-url": name}
    return "POST", "/hot_load/v1/models/hot_load", {"identity": "one"}, source


PLACES: dict[str, Place] = {
    "model read": in_path("GET", OWN + "/models/{}"),
    "model deleted": in_path("DELETE", OWN + "/models/{}"),
    "account": in_path("GET", "/v1/accounts/{}/models"),
    "job read": in_path("GET", OWN + "/rlorTrainerJobs/{}"),
    "checkpoints of a job": in_path("GET", OWN + "/rlorTrainerJobs/{}/checkpoints"),
    "deployment deleted": in_path("DELETE", OWN + "/deployments/{}"),
    "shape": in_path("GET", OWN + "/trainingShapes/{}/versions"),
    "data plane of a job": in_path("GET", "/training/v1/rlorTrainerJobs/local/{}/api/v1/healthz"),
    "data plane": in_path("POST", "/training/v1/rlorTrainerJobs/local/none/{}"),
    "download": in_path("GET", "/api/v1/downloads/ticket/{}"),
    "checkpoint of a run": in_path("GET", "/api/v1/training_runs/run/checkpoints/weights/{}/archive"),
    "anything": in_path("GET", "/{}"),
    "id of a job": in_path("POST", OWN + "/rlorTrainerJobs?rlorTrainerJobId={}"),
    "new model": in_body(OWN + "/models", modelId=HERE, stagedDir="0" * 32),
    "staged folder": in_body(OWN + "/models", modelId="stolen", stagedDir=HERE),
    "base of a job": in_body(OWN + "/rlorTrainerJobs", trainingConfig={"baseModel": HERE}),
    "base of a deployment": in_body(OWN + "/deployments?deploymentId=stolen", baseModel=HERE),
    "promoted name": in_body(
        OWN + "/checkpoints/c:promote",
        output_model=HERE,
        trainer_job_id="accounts/local/rlorTrainerJobs/j",
        base_model=BASE,
    ),
    "snapshot": in_body("/hot_load/v1/models/hot_load", identity=HERE),
    "completion": in_body("/inference/v1/completions", model=HERE, prompt=[1]),
    "state of a run": in_body("/api/v1/load_weights", path=HERE, session_id="s", model_seq_id=1, optimizer=False),
    "weights of a sampler": in_body(
        "/api/v1/create_sampling_session", session_id="s", sampling_session_seq_id=1, model_path=HERE
    ),
    "weights info": in_body("/api/v1/weights_info", tinker_path=HERE),
    "header": in_header,
}  # fmt: skip


@pytest.mark.prove
def test_no_name_leads_out_of_its_folder(
    server: Server, outside: Path, listener: socket.socket, record: Record
) -> None:
    targets = ["api_key", "firebox.db", "canary", str(outside / "canary"), "etc/passwd"]
    tried = payloads(targets, listener.getsockname()[1])
    assert len(tried) >= 500
    before, models = _tree(outside), server.own("GET", "models").json()["models"]
    siblings = sorted(path.name for path in server.data.parent.iterdir())
    secrets = (CANARY, server.key, "root:x:0")
    connection = http.client.HTTPConnection(*server.url.removeprefix("http://").split(":"), timeout=20)
    escapes, asked = [], 0
    for number, payload in enumerate(tried):
        for kind, place in itertools.islice(PLACES.items(), number % count(24, 3), None, count(24, 3)):
            method, path, body, headers = place(payload)
            headers = {"X-Api-Key": server.key, "Content-Type": "application/json", "Prefer": "wait=0", **headers}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
            asked += 1
            created = answer.status < 300 and method != "GET" and "request_id" not in text
            if answer.status >= 500 or created or any(secret in text for secret in secrets):
                escapes.append(f"{kind}: {payload!r}: {answer.status} {text[:200]}")
    record("payloads", len(tried))
    record("requests", asked)
    record("escapes", len(escapes))
    assert escapes == []
    assert _tree(outside) == before
    assert sorted(path.name for path in server.data.parent.iterdir()) == siblings
    assert server.own("GET", "models").json()["models"] == models
    assert select.select([listener], [], [], 0)[0] == [], "a URL was fetched"


def test_whatever_passes_as_a_name_stays_in_its_folder(tmp_path: Path) -> None:
    """The checks themselves, which trainers and samplers use as well."""
    checks: list[Callable[[str], Any]] = [
        lambda text: check_id("f", text),
        lambda text: check_model_id("f", text),
        lambda text: check_snapshot_id("f", text),
        lambda text: split_resource(f"accounts/local/models/{text}", "models")[1],
        lambda text: parse_state_ref(text, "local")[1],
        lambda text: parse_state_ref(f"cross_job://{text}", "local")[1],
        lambda text: tinker.parse_path(text, field="f").artifact,
        lambda text: tinker.parse_path(f"tinker://session-{'0' * 32}:train:0/weights/{text}", field="f").artifact,
    ]
    for payload, check in itertools.product(payloads(["api_key", "/etc/passwd", "x"], 1), checks):
        try:
            name = check(payload)
        except FireboxError:
            continue
        assert (tmp_path / name).resolve().parent == tmp_path, payload


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
