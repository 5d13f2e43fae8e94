"""A data directory of the first schema is taken over by today's server: nothing in it is lost, and all of it works."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import sqlalchemy
from alembic import command
from alembic.config import Config
from control_harness import Server  # type: ignore[import-not-found]

import firebox.control.app  # and with it every table
from firebox.control.database import Database
from firebox.control.tables.base import Base

KEY = "fb_from-the-first-days"
MODEL = "accounts/local/models/tiny"
JOB = "accounts/local/rlorTrainerJobs/old"
SHAPE = "accounts/local/deploymentShapes/tiny-cpu/versions/1"
TIME = "2026-01-01T00:00:00.000000Z"


def write_first_schema(path: Path) -> None:
    """As the first release left it: a model, a job that ran, one that was deleted, a deployment, a promotion."""
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(Path(firebox.control.__file__).parent / "migrations"))
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    engine.dispose()
    facts = {
        "kind": "HF_BASE_MODEL", "model_type": "qwen3", "parameter_count": 10, "moe": False, "context_length": 512,
    }  # fmt: skip
    job = {"trainingConfig": {"baseModel": MODEL, "loraRank": 0, "maxContextLength": 512}, "forwardOnly": False}
    deployment = {
        "baseModel": MODEL, "description": "", "minReplicaCount": 1, "maxReplicaCount": 1, "enableHotLoad": True,
        "forTraining": False, "deploymentShape": SHAPE, "hotLoadTrainerJob": JOB,
    }  # fmt: skip
    promotion = {"job": "old", "checkpoint": "step-1", "output": "out", "base": MODEL}
    rows = {
        "accounts": [("local", TIME)],
        "api_keys": [(hashlib.sha256(KEY.encode()).hexdigest(), "local", TIME)],
        "models": [("local", "tiny", "READY", TIME, TIME, json.dumps(facts))],
        "trainer_jobs": [
            ("local", ident, state, TIME, TIME, "", json.dumps(job), SHAPE.replace("deploymentS", "trainingS"), None)
            for ident, state in (("old", "JOB_STATE_RUNNING"), ("older", "JOB_STATE_DELETED"))
        ],
        "deployments": [("local", "served", "READY", TIME, TIME, "", json.dumps(deployment), 1, "[]", None)],
        "operations": [("local", "op", "DONE", TIME, TIME, json.dumps(promotion), json.dumps({"name": "x"}), None)],
    }
    with sqlite3.connect(path) as database:
        for table, values in rows.items():
            marks = ", ".join("?" * len(values[0]))
            database.executemany(f"INSERT INTO {table} VALUES ({marks})", values)
    database.close()


def test_first_data_directory_is_taken_over(tmp_path: Path, new_server: Callable[[], Server]) -> None:
    (tmp_path / "data").mkdir(mode=0o700)
    write_first_schema(tmp_path / "data" / "firebox.db")
    (tmp_path / "data" / "api_key").write_text(KEY + "\n")
    server = new_server()
    assert server.key == KEY
    assert [model["name"] for model in server.own("GET", "models").json()["models"]] == [MODEL]
    job = server.own("GET", "rlorTrainerJobs/old").json()
    assert (job["state"], job["trainingConfig"]["baseModel"]) == ("JOB_STATE_FAILED", MODEL)
    assert "gone when the server started" in job["statusMessage"]
    older = server.own("GET", "rlorTrainerJobs/older").json()
    assert older["state"] == "JOB_STATE_ARCHIVED", "it was deleted more than 30 days ago"
    served = server.own("GET", "deployments/served").json()
    assert (served["state"], served["hotLoadTrainerJob"]) == ("READY", JOB)
    assert server.own("GET", "operations/op").json()["done"] is True
    assert server.own("POST", "rlorTrainerJobs/old:resume").json()["state"] == "JOB_STATE_RUNNING"


def test_schema_of_the_tables_is_that_of_the_migrations(tmp_path: Path) -> None:
    """A column that the code knows and no migration makes would fail only when it is used."""
    Database(tmp_path / "new.db").close()
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path / 'new.db'}")
    inspector = sqlalchemy.inspect(engine)
    migrated = {t: {c["name"] for c in inspector.get_columns(t)} for t in inspector.get_table_names()}
    migrated.pop("alembic_version")
    assert migrated == {table.name: {column.name for column in table.columns} for table in Base.metadata.sorted_tables}
    engine.dispose()
