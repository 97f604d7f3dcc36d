"""Logs of the server on stderr: text for people, or one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal, TextIO, TypeAlias

from coprs_deploy.server.request_log import ACCESS_LOGGER

LogFormat: TypeAlias = Literal["text", "json"]

LOGGER = "coprs_deploy.server"
"""Logger of the server; of the other modules, warnings are logged."""

PACKAGE = "coprs_deploy"


class _TextFormatter(logging.Formatter):
    """A line as ``TIME LEVEL message name=value ...``."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; a traceback follows in its own lines."""
        fields = "".join(f" {name}={_word(value)}" for name, value in _fields(record).items())
        text = f"{_time(record)} {record.levelname} {record.getMessage()}{fields}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _JsonFormatter(logging.Formatter):
    """A line as one JSON object: time, level, logger, message, fields and traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record in one line."""
        content = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False)


def configure_logs(
    log_format: LogFormat, *, access_log: bool, stream: TextIO | None = None
) -> Callable[[], None]:
    """Send the logs of the server, of uvicorn and Python's warnings to one handler.

    Args:
        log_format: ``text`` or ``json``.
        access_log: whether each request has a line.
        stream: where to; default: stderr.

    Returns:
        A function that takes the handler away.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    logging.captureWarnings(log_format == "json")
    loggers = {name: logging.getLogger(name) for name in (PACKAGE, "uvicorn", "py.warnings")}
    for logger in loggers.values():
        logger.addHandler(handler)
        logger.propagate = False
    loggers[PACKAGE].setLevel(logging.WARNING)
    logging.getLogger(LOGGER).setLevel(logging.INFO)
    loggers["uvicorn"].setLevel(logging.WARNING)
    logging.getLogger(ACCESS_LOGGER).setLevel(logging.INFO if access_log else logging.WARNING)

    def undo() -> None:
        logging.captureWarnings(False)
        for logger in loggers.values():
            logger.removeHandler(handler)
            logger.propagate = True

    return undo


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = getattr(record, "fields", {})
    request_id = getattr(record, "request_id", None)
    return fields if request_id is None else {**fields, "request_id": request_id}


def _word(value: object) -> str:
    """Quote a value that could be taken for several, or for a line of its own."""
    text = str(value)
    return text if text.isprintable() and text and " " not in text else json.dumps(text)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
