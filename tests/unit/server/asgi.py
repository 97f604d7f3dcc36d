"""Exchanges with an ASGI application whose client stalls or leaves."""

import asyncio
import io

import numpy as np
from PIL import Image

from tests.unit.runtime_fakes import WAIT

MAX_BYTES = 100_000


def png(shape=(20, 30)):
    file = io.BytesIO()
    Image.fromarray(np.full((*shape, 3), 99, np.uint8)).save(file, "PNG")
    return file.getvalue()


def form():
    return (
        b'--x\r\nContent-Disposition: form-data; name="instruction"\r\n\r\nthe cup\r\n'
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        + png()
        + b"\r\n--x--\r\n"
    )


def scope_of(path, method="GET", **headers):
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
    }


async def never():
    await asyncio.Event().wait()


class Exchange:
    """A request and the messages that the application sent back.

    Args:
        accept: the Accept header; None for a GET of ``/health``.
        body: pieces of the body; without the last one, the client stalls after them.
        leaving: awaited before the client disconnects; by default it never does.
        reads: whether the client reads what is sent.
    """

    def __init__(self, accept=None, body=None, leaving=never, reads=lambda: True):
        content = form()
        self.scope = scope_of("/health")
        self.messages = []
        if accept is not None:
            headers = {
                "content_type": "multipart/form-data; boundary=x",
                "content_length": str(len(content)),
                "accept": accept,
            }
            self.scope = scope_of("/segment", "POST", **headers)
            self.messages = [
                {"type": "http.request", "body": piece, "more_body": body is not None}
                for piece in body or [content]
            ]
        self.is_received = body is None
        self.leaving = leaving
        self.reads = reads
        self.sent = []

    async def receive(self):
        if self.messages:
            return self.messages.pop(0)
        await (self.leaving if self.is_received else never)()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if not self.reads():
            await never()
        self.sent.append(message)

    async def run(self, app):
        await asyncio.wait_for(app(self.scope, self.receive, self.send), WAIT)
        return self

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def text(self):
        return b"".join(message.get("body", b"") for message in self.sent).decode()
