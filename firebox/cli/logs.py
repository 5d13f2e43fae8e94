"""How a server's log is written: one line of text per record, or one JSON object, with the request's id on both."""

from __future__ import annotations

import json
import logging
from typing import Any

from firebox.gateway.observe import request_id

_NOISY = ("httpx", "alembic")


def configure(*, as_json: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if as_json else _Text())
    handler.addFilter(_about_the_request)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record) + "".join(f" {name}={value}" for name, value in _fields(record).items())


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told)


def _about_the_request(record: logging.LogRecord) -> bool:
    record.request = request_id.get()
    return True


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = {"request": getattr(record, "request", ""), **getattr(record, "fields", {})}
    return {name: value for name, value in fields.items() if value not in (None, "")}
