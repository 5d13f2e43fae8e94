"""Names of the root API: a path and its artifact say the same, and nothing else gets through."""

from __future__ import annotations

import pytest

from firebox.wire import tinker
from firebox.wire.errors import InvalidArgument
from firebox.wire.names import check_snapshot_id

SESSION = "session-" + "0123456789abcdef" * 2
RUN = f"{SESSION}:train:7"


@pytest.mark.parametrize("kind", ["training", "sampler", "external"])
@pytest.mark.parametrize("name", ["a", "000010", "step-10", "step_10.best", "7-7"])
def test_path_and_artifact_say_the_same(kind: tinker.CheckpointType, name: str) -> None:
    path = tinker.checkpoint_path(RUN, kind, name)
    assert tinker.parse_path(path.path, field="path") == path
    assert tinker.of_artifact(path.artifact, "training" if kind == "training" else "sampler") == path
    assert check_snapshot_id("artifact", path.artifact) == path.artifact
    assert not tinker.is_own(path)


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "A", "a b", "-a", "a..b", "parked-1", "external.a", "sampling-session-3"]
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="path"):
        tinker.checkpoint_path(RUN, "sampler", name)


def test_name_must_fit_its_artifact() -> None:
    tinker.checkpoint_path(RUN, "training", "a" * 80)
    with pytest.raises(InvalidArgument, match="1 to 128"):
        tinker.checkpoint_path(RUN, "training", "a" * 120)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "weights/a",
        f"tinker://{RUN}",
        f"tinker://{RUN}/weights",
        f"tinker://{RUN}/weights/",
        f"tinker://{RUN}/weights/../x",
        f"tinker://{RUN}/other/x",
        f"tinker://{SESSION}/weights/x",
        f"tinker://{RUN}x/weights/x",
        f"tinker://{RUN[:-1]}9999999999/weights/x",
        "tinker://../weights/x",
    ],
)
def test_paths_that_are_none(path: str) -> None:
    with pytest.raises(InvalidArgument, match="path"):
        tinker.parse_path(path, field="path")


def test_servers_own_checkpoints() -> None:
    unnamed = tinker.sampling_session_checkpoint(RUN, 3)
    assert tinker.is_own(unnamed)
    assert tinker.sampler_of(tinker.of_artifact(unnamed.artifact, "sampler")) == f"{SESSION}:sample:3"
    assert tinker.sampler_of(tinker.checkpoint_path(RUN, "sampler", "step-3")) is None
    parked = tinker.parked_checkpoint(RUN)
    assert tinker.is_own(parked)
    assert tinker.parked_checkpoint(RUN) != parked


def test_ids_of_runs() -> None:
    assert tinker.run_id(SESSION, 7) == RUN
    assert tinker.session_of(RUN) == SESSION
    for wrong in ("", "session-1", f"{SESSION}:train:x", f"{SESSION}:sample:1"):
        with pytest.raises(InvalidArgument, match="model_id"):
            tinker.session_of(wrong)
    with pytest.raises(InvalidArgument, match="create_session"):
        tinker.run_id("session-1", 0)
