"""Manifests: the commit point of every durable artifact. Torch-free.

A directory without a readable `manifest.json` does not exist as far as any reader is concerned. Writers fill a
hidden sibling directory, fsync, write the manifest last and rename the directory into place (`committed_dir`).
Invariant: a committed directory never changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, TypeVar, cast

import msgspec

from firebox.wire.errors import AlreadyExists, FailedPrecondition
from firebox.wire.worker import SnapshotKind

MANIFEST_NAME: Final = "manifest.json"
SNAPSHOT_FORMAT: Final = "firebox-snapshot-1"
CHECKPOINT_FORMAT: Final = "firebox-checkpoint-1"


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the artifact, `path` relative to the directory."""

    path: str
    size: int
    sha256: str


PROBE_TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 0.25}
"""Nats, by the dtype of the weights. Another attention kernel sums in another order; bfloat16 snapshots are probed with
the trainer's float32 master weights."""


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens [T] and the trainer's log-probs [T-1] of tokens 1..T-1 under exactly these weights, in nats."""

    tokens: list[int]
    logprobs: list[float]


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    rank: int
    alpha: float
    target_modules: list[str]


class SnapshotManifest(msgspec.Struct, frozen=True, kw_only=True):
    """Weights for a sampler, or for promotion. `parent` is set for a delta only; `adapter` for an adapter only.

    `untied_head`: the head has weights of its own here, although the base model shares them with its embedding.
    """

    format: Literal["firebox-snapshot-1"] = SNAPSHOT_FORMAT
    identity: str
    kind: SnapshotKind
    parent: str | None = None
    base_model: str
    dtype: str
    step: int
    created_at: str
    files: list[FileEntry]
    probe: Probe | None = None
    adapter: AdapterInfo | None = None
    untied_head: bool = False


class CheckpointManifest(msgspec.Struct, frozen=True, kw_only=True):
    """Trainer state for resume: weights, optimizer, step, RNG and pending gradients, as DCP shards."""

    format: Literal["firebox-checkpoint-1"] = CHECKPOINT_FORMAT
    name: str
    base_model: str
    step: int
    created_at: str
    files: list[FileEntry]
    adapter: AdapterInfo | None = None


Manifest = SnapshotManifest | CheckpointManifest
_M = TypeVar("_M", SnapshotManifest, CheckpointManifest)

# Made here, by one thread: msgspec crashes when two threads are the first to decode one type.
_DECODERS: Final = {kind: msgspec.json.Decoder(kind) for kind in (SnapshotManifest, CheckpointManifest)}


def read_snapshot(directory: Path) -> SnapshotManifest | None:
    """The snapshot manifest in `directory`, or None when nothing was committed there."""
    return _read(directory, SnapshotManifest)


def read_checkpoint(directory: Path) -> CheckpointManifest | None:
    """The checkpoint manifest in `directory`, or None when nothing was committed there."""
    return _read(directory, CheckpointManifest)


def _read(directory: Path, kind: type[_M]) -> _M | None:
    try:
        raw = (directory / MANIFEST_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return cast(_M, _DECODERS[kind].decode(raw))
    except msgspec.DecodeError as error:
        raise FailedPrecondition(
            f"{directory / MANIFEST_NAME} is damaged: {error}", reason="MANIFEST_DAMAGED"
        ) from error


@contextlib.contextmanager
def committed_dir(target: Path) -> Iterator[Path]:
    """Yield a hidden scratch directory; on a clean exit make it durable and rename it to `target`.

    The caller writes its files and, last, the manifest (`seal`). Raises AlreadyExists when `target` is there.
    On an error, or a kill, `target` never appears.
    """
    if target.exists():
        raise AlreadyExists(f"{target.name} exists already; choose another name", reason="ARTIFACT_EXISTS")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, scratch, ignore_errors=True)
        scratch.mkdir()
        yield scratch
        if not (scratch / MANIFEST_NAME).exists():
            raise AssertionError("committed_dir: the manifest was not written")
        os.rename(scratch, target)
        undo.pop_all()
    _fsync(target.parent)


def sweep_scratch(parent: Path) -> None:
    """Remove what killed writers left in `parent`. Only for its single writer, before it writes anything."""
    for scratch in parent.glob(".*"):
        shutil.rmtree(scratch)


def seal(directory: Path, manifest: Manifest) -> None:
    """Fsync every file of `manifest`, then write and fsync the manifest itself."""
    for entry in manifest.files:
        _fsync(directory / entry.path)
    path = directory / MANIFEST_NAME
    path.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    _fsync(path)
    _fsync(directory)


def describe(directory: Path) -> list[FileEntry]:
    """A FileEntry per regular file under `directory`, sorted by path; the manifest itself is left out."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST_NAME)
    return [FileEntry(path=str(p.relative_to(directory)), size=p.stat().st_size, sha256=_sha256(p)) for p in files]


def verify(directory: Path, manifest: Manifest) -> None:
    """Check size and sha256 of every file; raises FailedPrecondition naming the first bad one."""
    for entry in manifest.files:
        path = directory / entry.path
        if not path.is_file():
            raise FailedPrecondition(f"{path}: file is missing", reason="ARTIFACT_DAMAGED")
        if path.stat().st_size != entry.size or _sha256(path) != entry.sha256:
            raise FailedPrecondition(f"{path}: content does not match its checksum", reason="ARTIFACT_DAMAGED")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
