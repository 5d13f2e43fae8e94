"""The metadata store: one SQLite file, one connection, one thread.

Owns the engine, its pragmas and the migrations. Invariant: every transaction runs on the single writer thread, so
no two ever overlap and the event loop never waits on a disk. A transaction holds no network or process work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import StaticPool, create_engine, event
from sqlalchemy.orm import Session, sessionmaker

from firebox.wire.errors import InvalidArgument

T = TypeVar("T")


class Database:
    """The store in `path`, migrated to the newest schema. `run` is the only way in."""

    def __init__(self, path: Path) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")
        self._engine = create_engine(
            f"sqlite:///{path}", poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
        event.listen(self._engine, "connect", _set_pragmas)
        self._sessions = sessionmaker(self._engine, expire_on_commit=False)
        with self._engine.begin() as connection:
            config = Config()
            config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    async def run(self, work: Callable[[Session], T]) -> T:
        """Run `work` in one transaction; rows it returns stay readable afterwards.

        Raises what `work` raises, and InvalidArgument for a text or a number that cannot be stored.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work)

    def close(self) -> None:
        self._thread.shutdown()
        self._engine.dispose()

    def _transact(self, work: Callable[[Session], T]) -> T:
        try:
            with self._sessions.begin() as session:
                return work(session)
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no text encoding can
            raise InvalidArgument(f"a text in this request is not valid Unicode: {error.object!r}") from error
        except OverflowError as error:
            raise InvalidArgument(f"a number in this request is too large to be stored ({error})") from error


def _set_pragmas(connection: Any, _record: object) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")
