"""Logs as JSON lines: time, level, event, and the fields that the record carries."""

import json
import logging
from datetime import UTC, datetime
from typing import Any


def log(logger: logging.Logger, event: str, **fields: Any) -> None:
    """Write one event."""
    logger.info(event, extra={"fields": fields})


class JsonLines(logging.Formatter):
    """One JSON object a line; an exception's traceback is a field of it."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
