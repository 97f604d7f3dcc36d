"""A stand-in for an OpenAI-compatible server, whose responses a test scripts."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD = {
    "logical_correctness": 1.0,
    "task_relevance": 0.5,
    "visual_consistency": 0.25,
    "localization_accuracy": 0,
}
"""Quality: 0.3 + 0.1 + 0.075 = 0.475."""

GOOD_TEXT = json.dumps(GOOD)


def answer(content=GOOD_TEXT, **message):
    """Return the body of a completion."""
    choice = {"message": {"role": "assistant", "content": content, **message}}
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return json.dumps({"choices": [choice], "usage": usage})


class Silence(float):
    """A response that comes after so many seconds."""


@contextmanager
def judge_server(script):
    """Serve ``script(number, request)`` for each request, counted from 0.

    It returns a body, a status with a body and headers, or ``Silence``. Yields the base URL and the
    list of requests, each with its ``path``, ``headers`` and ``body``.
    """
    requests, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = {"path": self.path, "headers": dict(self.headers), "body": body}
            with lock:
                number = len(requests)
                requests.append(request)
            response = script(number, request)
            if isinstance(response, Silence):
                time.sleep(response)
                response = answer()
            status, text, headers = response if isinstance(response, tuple) else (200, response, {})
            data = text.encode()
            self.send_response(status)
            headers = {"Content-Length": str(len(data)), **headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):  # the client has given up
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
