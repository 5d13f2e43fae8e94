"""Which checkpoints and snapshots of jobs may go, when the operator limits what is kept. By default nothing does.

Root sessions have lifetimes of their own and are left alone. Invariant: what somebody needs stays, whatever the limits:
the newest state and the newest snapshot of each job, what a deployment is to serve, what a promotion is made from, and
every snapshot that one which stays builds upon.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from firebox.control.services import checkpoints, operations
from firebox.control.services.context import Control
from firebox.control.tables.deployments import DeploymentRow
from firebox.control.tables.trainer_jobs import TrainerJobRow
from firebox.weights.manifest import CheckpointManifest, SnapshotManifest


@dataclass(frozen=True)
class Limits:
    """Of each job the newest `keep_last` states and as many snapshots stay; all jobs' together may take `disk_bytes`,
    beyond which the oldest go. None limits nothing."""

    keep_last: int | None = None
    disk_bytes: int | None = None

    @property
    def any(self) -> bool:
        return self.keep_last is not None or self.disk_bytes is not None


class Artifact(NamedTuple):
    """A committed directory; `parent` is the snapshot that it builds upon."""

    directory: Path
    created_at: str
    size: int
    parent: Path | None


async def removable(control: Control, limits: Limits) -> list[Artifact]:
    """What goes now, oldest first."""
    folders, needed = await control.db.run(lambda session: _rows(control, session))
    artifacts = await asyncio.to_thread(lambda: [a for folder in folders for a in _scan(folder)])
    return choose(artifacts, needed, limits)


def choose(artifacts: Sequence[Artifact], needed: Collection[Path], limits: Limits) -> list[Artifact]:
    """Of `artifacts` those that the limits leave no place for, and nobody needs; oldest first."""
    by_age = sorted(artifacts, key=lambda a: a.created_at)
    parents = {a.directory: a.parent for a in artifacts}
    newest = _last_of_each(by_age, 1)
    staying = set(_with_parents(newest | set(needed), parents))
    if limits.keep_last is None:
        kept = by_age
    else:
        named = set(_with_parents(_last_of_each(by_age, limits.keep_last), parents)) | staying
        kept = [a for a in by_age if a.directory in named]
    if limits.disk_bytes is not None:
        kept = _within(kept, staying, limits.disk_bytes)
    return [a for a in by_age if a not in kept]


def _within(by_age: Sequence[Artifact], staying: Collection[Path], budget: int) -> list[Artifact]:
    """What is left when the oldest make room, each together with what builds upon it."""
    left, total = {a.directory: a for a in by_age}, sum(a.size for a in by_age)
    for oldest in by_age:
        if total <= budget:
            break
        if oldest.directory in left and oldest.directory not in staying:
            gone = {oldest.directory}
            for later in by_age:  # a delta is younger than its parent, so one pass finds the whole chain
                if later.parent in gone:
                    gone.add(later.directory)
            total -= sum(left.pop(path).size for path in gone if path in left)
    return list(left.values())


def _last_of_each(by_age: Sequence[Artifact], number: int) -> set[Path]:
    """The newest `number` directories of every folder."""
    by_folder = sorted(by_age, key=lambda a: a.directory.parent)
    groups = (list(group) for _, group in groupby(by_folder, key=lambda a: a.directory.parent))
    return {a.directory for group in groups for a in group[-number:]}


def _with_parents(directories: Collection[Path], parents: dict[Path, Path | None]) -> Iterator[Path]:
    for directory in directories:
        link: Path | None = directory
        while link is not None:
            yield link
            link = parents.get(link)


def _rows(control: Control, session: Session) -> tuple[list[Path], set[Path]]:
    """The folders of every job that is not the server's own, and the snapshots that somebody needs."""
    jobs = session.scalars(select(TrainerJobRow).where(TrainerJobRow.pooled.is_(False)))
    folders = [control.layout.job(job.account, job.id) for job in jobs]
    wanted = session.scalars(select(DeploymentRow.desired).where(DeploymentRow.desired.is_not(None)))
    needed = {Path(desired["path"]) for desired in wanted if desired}
    for row in session.scalars(operations.all_pending()):
        needed.add(control.layout.job(row.account, row.request["job"]) / "snapshots" / row.request["checkpoint"])
    return folders, needed


def _scan(folder: Path) -> Iterator[Artifact]:
    for directory, state in checkpoints.committed(folder / "checkpoints", CheckpointManifest):
        yield Artifact(directory, state.created_at, sum(file.size for file in state.files), None)
    for directory, snapshot in checkpoints.committed(folder / "snapshots", SnapshotManifest):
        parent = directory.parent / snapshot.parent if snapshot.parent else None
        yield Artifact(directory, snapshot.created_at, sum(file.size for file in snapshot.files), parent)
