"""From what a client calls an adapter to the adapter: a registered model, or a directory that the operator allows.

Owns which files of this machine a client may make the trainer read. Does not know what the factors are used for.

Invariant: nothing is read, nor is it told whether it exists, outside the models of the account and the allowed folders.
"""

from __future__ import annotations

import os
from pathlib import Path

from firebox.weights.peft import PeftAdapter, read_peft
from firebox.weights.snapshot import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from firebox.wire.errors import FailedPrecondition, InvalidArgument, NotFound
from firebox.wire.names import SHARED_ACCOUNT, split_resource
from firebox.wire.worker import TrainerSpec


def find_adapter(ref: str, spec: TrainerSpec) -> PeftAdapter:
    """The adapter `accounts/<account>/models/<id>`, or in the directory `ref`.

    Raises InvalidArgument for a reference that cannot be followed, NotFound, and FailedPrecondition for an adapter of
    another base model or one that cannot be read.
    """
    adapter = read_peft(_registered(ref, spec) if ref.startswith("accounts/") else _allowed(ref, spec))
    base = adapter.base_model or ""
    # Hub names of other people's adapters say nothing here; the shapes still have to fit.
    if base.startswith("accounts/") and base.rpartition("/")[2] != spec.base_model.rpartition("/")[2]:
        raise FailedPrecondition(
            f"adapter_path: {ref!r} is an adapter of {base!r}, this job trains {spec.base_model!r}",
            reason="ADAPTER_MISMATCH",
        )
    return adapter


def _registered(ref: str, spec: TrainerSpec) -> Path:
    owner, ident = split_resource(ref, "models", field="adapter_path")
    account = split_resource(spec.job, "rlorTrainerJobs")[0]
    if owner not in (account, SHARED_ACCOUNT):
        raise InvalidArgument(f"adapter_path: {ref!r} belongs to another account; yours is {account!r}")
    if spec.models_dir is None:
        raise InvalidArgument("adapter_path: this trainer runs without a server, so no models are registered")
    directory = Path(spec.models_dir) / ident
    if not (directory / ADAPTER_CONFIG_FILE).is_file():
        known = sorted(path.parent.name for path in Path(spec.models_dir).glob(f"*/{ADAPTER_CONFIG_FILE}"))
        raise NotFound(
            f"adapter_path: there is no registered adapter {ref!r}; known ones: {', '.join(known) or 'none'}",
            reason="ADAPTER_NOT_FOUND",
        )
    return directory


def _allowed(ref: str, spec: TrainerSpec) -> Path:
    if not ref.startswith("/") or "\0" in ref:
        raise InvalidArgument(
            f"adapter_path: {ref!r} is neither accounts/<account>/models/<id> nor an absolute directory of the server"
        )
    roots = [os.path.realpath(root) for root in spec.allow_dirs]
    # Links are followed first, those of the files too: what counts is what would be read.
    for path in (ref, f"{ref}/{ADAPTER_CONFIG_FILE}", f"{ref}/{ADAPTER_FILE}"):
        real = os.path.realpath(path)
        if not any(os.path.commonpath([real, root]) == root for root in roots):
            raise InvalidArgument(
                f"adapter_path: {ref!r} does not lie in a folder that this server may read adapters from; "
                "promote the adapter, or ask the operator for firebox up --allow-dir"
            )
    return Path(os.path.realpath(ref))
