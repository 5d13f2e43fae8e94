"""Hot-loading: which snapshot a deployment is to serve, how to get there, and what its replicas say they serve.

Invariant: the status is what the replicas themselves answer; the wanted snapshot is never reported as the loaded one.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
from sqlalchemy.orm import Session

from firebox.control.services import buckets, checkpoints, deployments
from firebox.control.services.context import Control, own
from firebox.control.tables.deployments import DeploymentRow
from firebox.weights import manifest as manifests
from firebox.weights.manifest import SnapshotManifest
from firebox.wire.control import HotLoad
from firebox.wire.errors import FailedPrecondition, InvalidArgument, NotFound
from firebox.wire.worker import HotloadCommand, ReplicaStatus, WorkerAddress

_NOT_MOVED: Final = "these weights give exactly the log-probs of those before; did a step with a gradient come between?"
_NOT_STARTED: Final = ReplicaStatus(current_snapshot_identity=None, stage="fetching")


async def target(control: Control, account: str, header: str) -> DeploymentRow:
    """The deployment named by the `fireworks-deployment` header."""
    if not header:
        raise InvalidArgument("fireworks-deployment: this header must name the deployment")
    name = own(account, header, DeploymentRow.collection, field="fireworks-deployment")
    return await deployments.get(control, account, name)


async def request(control: Control, account: str, row: DeploymentRow, body: HotLoad) -> int:
    """Make the snapshot `body.identity` the wanted one; returns the sequence number of this wish.

    Raises NotFound for an unknown snapshot and FailedPrecondition for one this deployment cannot serve.
    """
    _check_ready(row)
    path, manifest = await _find(control, row, body.identity)
    base, _, _ = await deployments.served_model(control, row)
    if manifest.base_model != base.name:
        raise FailedPrecondition(
            f"identity: snapshot {body.identity!r} is of {manifest.base_model!r}, this deployment serves "
            f"{base.name!r}; hot-load it into a deployment of its own base model",
            reason="BASE_MODEL_MISMATCH",
        )
    incremental = body.incremental_snapshot_metadata
    if manifest.kind == "delta" and incremental is None:
        raise FailedPrecondition(
            f"identity: {body.identity!r} is a delta; send incremental_snapshot_metadata, or a base snapshot",
            reason="DELTA_WITHOUT_PARENT",
        )
    previous = incremental.previous_snapshot_identity if incremental and manifest.kind == "delta" else None

    await asyncio.to_thread(_check_chain, path, manifest)

    def work(session: Session) -> int:
        stored = session.get_one(DeploymentRow, (row.account, row.id))
        sequence = wanted(stored) + 1
        stored.desired = {"identity": body.identity, "path": str(path), "previous": previous, "sequence": sequence}
        return sequence

    sequence = await control.db.run(work)
    control.changes.notify(row.name)
    return sequence


def wanted(row: DeploymentRow) -> int:
    """The number of the last wish, 0 without one."""
    return int((row.desired or {}).get("sequence", 0))


async def done(control: Control, row: DeploymentRow, sequence: int, within_s: float) -> None:
    """Return once every replica has loaded or refused wish number `sequence`, or after `within_s` seconds."""

    async def applied() -> bool:
        seen = await deployments.find(control, row.account, row.id)
        if seen is None or seen.state not in deployments.LIVE or deployments.num_replicas(seen.request) == 0:
            return True
        return control.fleet.applied(row.name) >= sequence

    await control.changes.until(row.name, applied, lambda value: value, within_s)


async def status(control: Control, row: DeploymentRow) -> dict[str, Any]:
    """The wanted snapshot, and one entry per replica, asked now, those that do not serve it first.

    Clients judge by the first entry. A replica that is still starting, or does not answer, is not ready.
    """
    serving = control.fleet.all(row.name)
    stored = await deployments.find(control, row.account, row.id) or row
    desired = (stored.desired or {}).get("identity")
    replies = await asyncio.gather(*(_ask(control, address) for address in serving))
    missing = max(0, deployments.num_replicas(stored.request) - len(serving))
    replies += [_entry(_NOT_STARTED, ready=False)] * missing
    return {
        "desired_snapshot_identity": desired,
        "replicas": sorted(replies, key=lambda reply: bool(reply["current_snapshot_identity"] == desired)),
    }


def commands(row: DeploymentRow, current: str | None, *, fresh: bool) -> list[HotloadCommand]:
    """What to send a replica that has `current` loaded so that it serves the wanted snapshot.

    A `fresh` replica, which no client has spoken to, gets the deltas one after the other from their base; another
    one gets exactly what the client asked for. Reads manifests, so it blocks.
    """
    desired = row.desired
    if desired is None or desired["identity"] == current:
        return []
    if not fresh:
        return [HotloadCommand(identity=desired["identity"], path=desired["path"], previous=desired["previous"])]
    chain: list[HotloadCommand] = []
    identity: str | None = desired["identity"]
    while identity is not None and identity != current:
        path = Path(desired["path"]).parent / identity
        manifest = manifests.read_snapshot(path)
        parent = manifest.parent if manifest is not None and manifest.kind == "delta" else None
        chain.append(HotloadCommand(identity=identity, path=str(path), previous=parent))
        identity = parent
    return chain[::-1]


def _check_ready(row: DeploymentRow) -> None:
    if row.state not in (deployments.READY, deployments.UPDATING):
        raise FailedPrecondition(f"deployment {row.id!r} is in state {row.state}; wait until it is READY")
    if deployments.num_replicas(row.request) == 0:
        raise FailedPrecondition(f"deployment {row.id!r} is scaled to zero; give it a replica first")
    if not row.request.get("enableHotLoad"):
        raise FailedPrecondition(f"deployment {row.id!r} was created without enableHotLoad; create another one with it")


async def _find(control: Control, row: DeploymentRow, identity: str) -> tuple[Path, SnapshotManifest]:
    """The snapshot in the deployment's bucket, which several jobs may share; raises NotFound naming what is there."""
    jobs = await buckets.jobs(control, row)
    if not jobs:
        raise FailedPrecondition(
            f"deployment {row.id!r} has no bucket to load from; PATCH its hotLoadTrainerJob, or create a "
            "job with hotLoadDeploymentId"
        )
    for job in jobs[:-1]:
        with contextlib.suppress(NotFound):
            return await checkpoints.snapshot(control, row.account, job, identity)
    return await checkpoints.snapshot(control, row.account, jobs[-1], identity)


def _check_chain(path: Path, manifest: SnapshotManifest) -> None:
    """A delta is only as good as the snapshots under it: each must be there, down to a whole one."""
    while manifest.kind == "delta":
        parent = manifests.read_snapshot(path.parent / str(manifest.parent))
        if parent is None:
            raise FailedPrecondition(
                f"identity: {path.name!r} stands on {manifest.parent!r}, which is missing; hot-load a base snapshot",
                reason="CHAIN_BROKEN",
            )
        manifest = parent


async def _ask(control: Control, address: WorkerAddress) -> dict[str, Any]:
    try:
        return _entry(await control.probe(address), ready=True)
    except (httpx.HTTPError, msgspec.DecodeError) as error:
        return _entry(_NOT_STARTED, ready=False) | {"message": f"the replica does not answer: {error!r}"}


def _entry(status: ReplicaStatus, *, ready: bool) -> dict[str, Any]:
    return {
        "current_snapshot_identity": status.current_snapshot_identity,
        "readiness": ready and status.stage != "error",
        "loading_state": {
            "stage": "error" if status.error else status.stage,
            "target_snapshot_identity": status.target_snapshot_identity,
        },
        "loaded_adapters": [],
        "supports_rdma_weight_sync": False,
        "message": status.error,
        "timeline": msgspec.to_builtins(status.timeline),
        "canary": msgspec.to_builtins(status.canary),
        "warning": _NOT_MOVED if status.canary is not None and status.canary.movement == 0.0 else "",
    }
