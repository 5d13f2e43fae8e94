"""Shapes: templates applied to models and modes, their versions, names and filters, and the files users add."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from control_harness import Server  # type: ignore[import-not-found]

from firebox.control.catalogue import load_templates
from firebox.control.tables import trainer_jobs as tables
from firebox.wire.errors import InvalidArgument

ALL = "/v1/accounts/-/trainingShapes/-/versions"
HERE = ("cpu", "cpu-large", "cpu-small")
ELSEWHERE = ("128k-h200", "gpu1", "gpus", "minimum-h200", "nodes2")
OWN = """
id: {id}
version: {version}
validated: {validated}
accelerator_type: CPU
max_context_length: 64
threads: 1
dtype: float32
"""


def versions(server: Server, **params: Any) -> list[str]:
    answer = server.ask("GET", ALL, params=params).json()
    return [version["name"].split("/")[3] for version in answer["trainingShapeVersions"]]


def test_shapes_follow_models_templates_and_modes(server: Server) -> None:
    assert sorted(versions(server)) == sorted(
        f"tiny-{hardware}{mode}" for hardware in (*HERE, *ELSEWHERE) for mode in ("", "-forward", "-lora")
    )
    expression = (
        'snapshot.base_model="accounts/fireworks/models/tiny" AND snapshot.trainer_mode="LORA_TRAINER" AND '
        'latest_validated=true AND snapshot.parameter_count>=10 AND snapshot.accelerator_type="CPU"'
    )
    found = versions(server, filter=expression, orderBy="create_time desc", pageSize=200)
    assert sorted(found) == sorted(f"tiny-{hardware}-lora" for hardware in HERE)
    assert versions(server, filter="snapshot.parameter_count<=9") == []
    one = server.own(
        "GET", "trainingShapes/tiny-cpu/versions", params={"filter": "latest_validated=true", "pageSize": 1}
    )
    snapshot = one.json()["trainingShapeVersions"][0]["snapshot"]
    assert snapshot["maxSupportedContextLength"] == 512
    assert snapshot["deploymentShapeVersion"] == "accounts/local/deploymentShapes/tiny-cpu/versions/1"
    assert server.own("GET", "deploymentShapes/tiny-cpu/versions/1").json()["snapshot"]["engine"] == "FIREBOX"
    assert server.own("GET", "trainingShapes/tiny-cpu/versions/9").status_code == 404


def test_shape_tells_whether_it_runs_here(server: Server) -> None:
    shown = {v["name"].split("/")[3]: v.get("misfit") for v in server.ask("GET", ALL).json()["trainingShapeVersions"]}
    assert {name for name, misfit in shown.items() if misfit is None} == {
        f"tiny-{hardware}{mode}" for hardware in HERE for mode in ("", "-forward", "-lora")
    }
    assert "2 nodes" in shown["tiny-nodes2"]
    assert "8 NVIDIA_H200_141GB" in shown["tiny-128k-h200"]


def test_pages_join_up(server: Server) -> None:
    found, token = [], ""
    while True:
        params = {"pageSize": 7, "pageToken": token}
        answer = server.ask("GET", ALL, params=params).json()
        found += answer["trainingShapeVersions"]
        token = answer["nextPageToken"]
        if not token:
            break
    assert len({version["name"] for version in found}) == len(found) == answer["totalSize"] == 24


@pytest.mark.parametrize(
    "params", [{"filter": "colour=red"}, {"filter": "name ~ x"}, {"orderBy": "size"}, {"pageToken": "???"}]
)
def test_listing_that_is_not_understood_is_refused(server: Server, params: dict[str, str]) -> None:
    answer = server.ask("GET", ALL, params=params)
    assert answer.status_code == 400
    assert next(iter(params)) in answer.json()["error"]["message"]


def test_users_templates_join_the_shipped_ones(new_server: Callable[..., Server], model_files: Path) -> None:
    """The names of a public script, unchanged, where an own template says which hardware stands for theirs."""
    server = new_server()
    server.stop()
    folder = server.data / "shapes"
    folder.mkdir()
    for number, validated in ((2, "true"), (3, "false")):
        text = OWN.format(id="128k-h200", version=number, validated=validated)
        (folder / f"h200-{number}.yaml").write_text(text)
    server.start()
    server.add_model("tiny", model_files)
    aliases = {"aliases": ["accounts/fireworks/models/qwen3-8b"]}
    assert server.own("PATCH", "models/tiny", json=aliases).status_code == 200

    public = "accounts/fireworks/trainingShapes/qwen3-8b-128k-h200"
    found = server.ask("GET", f"/v1/{public}/versions", params={"filter": "latest_validated=true"}).json()
    (latest,) = found["trainingShapeVersions"]
    assert latest["name"] == "accounts/local/trainingShapes/tiny-128k-h200/versions/2"
    every = server.ask("GET", f"/v1/{public}/versions").json()["trainingShapeVersions"]
    assert [(v["name"][-1], v["validated"], v["latestValidated"]) for v in every] == [
        ("1", True, False), ("2", True, True), ("3", False, False)
    ]  # fmt: skip
    reference = server.ask("GET", f"/v1/{public}-forward/versions/3").json()["snapshot"]
    assert (reference["trainerMode"], reference["maxSupportedContextLength"]) == ("FORWARD_ONLY", 64)
    assert versions(server, filter='snapshot.base_model="accounts/fireworks/models/qwen3-8b"') == versions(server)

    body = {"trainingConfig": {"baseModel": "accounts/fireworks/models/qwen3-8b"}}
    made = server.own("POST", "rlorTrainerJobs", params={"trainingShape": public}, json=body).json()
    assert made["state"] == "JOB_STATE_RUNNING"
    assert made["trainingConfig"]["baseModel"] == "accounts/local/models/tiny"
    assert made["trainingConfig"]["maxContextLength"] == 64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (OWN.format(id="cpu", version=1, validated="true"), "version"),
        (OWN.format(id="Loud", version=1, validated="true"), "id"),
        (OWN.format(id="own", version=0, validated="true"), "version"),
        (OWN.format(id="own", version=1, validated="true") + "colour: red\n", "colour"),
        (OWN.format(id="own", version=1, validated="true").replace("threads: 1", "threads: some"), "threads"),
        ("- a list", "the file"),
        ("id: [", "YAML"),
    ],
)
def test_wrong_template_names_file_and_field(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InvalidArgument) as refused:
        load_templates(tmp_path)
    assert "mine.yaml" in refused.value.message
    assert words in refused.value.message


def test_pages_name_every_template_and_state() -> None:
    pages = Path(__file__).parents[3] / "docs" / "reference"
    table = (pages / "shapes.md").read_text().partition("## Templates")[2].partition("\n## ")[0]
    told = re.findall(r"`([\w-]+)`", "".join(line.split("|")[1] for line in table.splitlines() if line[:1] == "|"))
    assert sorted(told) == sorted({template.id for template in load_templates(Path("/nowhere"))})
    rows = [line for line in (pages / "jobs.md").read_text().splitlines() if line.startswith("| `")]
    states = {f"JOB_STATE_{state}" for line in rows for state in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert states == {value for name, value in vars(tables).items() if name.isupper() and isinstance(value, str)} - {
        tables.CANCELLING, tables.DELETING
    }  # fmt: skip
