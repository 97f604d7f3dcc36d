"""What the log and the metrics say about a request, collected while it is served."""

from __future__ import annotations

import re
import secrets
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from coprs_deploy.runtime import Timings

REQUEST_ID_HEADER = "X-Request-ID"

_ACCEPTED_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


@dataclass
class RequestRecord:
    """A request.

    Attributes:
        request_id: id that the client sent, or a new one.
        status: status of the response; 0 before it is sent.
        error: type of the error that ended it; empty for none.
        key: name of its API key; empty for none.
        num_instructions: number of instructions; 0 before its body is read.
        timings: of each result.
    """

    SCOPE_KEY: ClassVar[str] = "coprs_request"

    request_id: str
    status: int = 0
    error: str = ""
    key: str = ""
    num_instructions: int = 0
    timings: list[Timings] = field(default_factory=list)

    @classmethod
    def of(cls, scope: MutableMapping[str, Any]) -> RequestRecord:
        """Return the record of an ASGI scope; it begins with the first call."""
        record: RequestRecord | None = scope.get(cls.SCOPE_KEY)
        if record is None:
            given = dict(scope["headers"]).get(REQUEST_ID_HEADER.lower().encode(), b"")
            request_id = given.decode("latin-1")
            if not _ACCEPTED_ID.fullmatch(request_id):
                request_id = secrets.token_hex(16)
            record = scope[cls.SCOPE_KEY] = cls(request_id)
        return record
