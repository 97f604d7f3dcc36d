"""Client of an OpenAI-compatible chat endpoint: one request with retries, and what it cost.

Only the standard library is used. Temporary failures (a busy server, a timeout, a broken
connection) are retried with growing pauses; what a retry cannot change is raised at once.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, NoReturn
from urllib.parse import urlsplit

from coprs_deploy.errors import EndpointError, shorten
from coprs_deploy.version import __version__

PATH = "/chat/completions"

MAX_PAUSE_S = 60.0
"""Longest pause before a retry, also if the server requests a longer one."""

MAX_RESPONSE_BYTES = 4 * 2**20

TEMPORARY = (408, 409, 425, 429)
"""Status codes of temporary failures, beside all from 500."""

UNUSABLE = (401, 402, 403, 404, 405)
"""Status codes that every further request would get too."""


class RequestFailedError(Exception):
    """One request failed, and others may succeed.

    Attributes:
        kind: short name, for counts of failures.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True)
class Completion:
    """Answer of the model.

    Attributes:
        text: the generated text.
        prompt_tokens: tokens of the prompt as counted by the server; 0 if it counts none.
        completion_tokens: generated tokens as counted by the server; 0 if it counts none.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int


class ChatEndpoint:
    """A model behind ``URL/chat/completions``; may be called from several threads.

    Args:
        url: base URL, as in ``http://localhost:8000/v1``, with or without the path of the call.
        model: name of the model.
        key: bearer token; empty sends none.
        timeout_s: longest silence of the server.
        max_attempts: attempts of one request.
        pause: waits a number of seconds.

    Raises:
        ValueError: the URL is not absolute, or a setting is out of range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str = "",
        timeout_s: float = 120.0,
        max_attempts: int = 5,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            parts = urlsplit(url)
            is_absolute = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            is_absolute = False
        if not is_absolute:
            raise ValueError(f"url is {url!r}; accepted: http://HOST[:PORT]/v1, or https")
        if not model:
            raise ValueError("model is empty; name the model that the endpoint serves")
        if max_attempts < 1 or not timeout_s > 0:
            raise ValueError(
                f"max_attempts is {max_attempts} and timeout_s is {timeout_s}; accepted: 1 or more "
                "attempts, and a time above 0"
            )
        base = url.rstrip("/")
        self.url, self.model = base if base.endswith(PATH) else base + PATH, model
        self._timeout_s, self._max_attempts, self._pause = timeout_s, max_attempts, pause
        self._headers = {
            "Content-Type": "application/json",
            "User-Agent": f"coprs-deploy/{__version__}",
        }
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._key = key
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._extra: dict[str, Any] = {"temperature": 0}
        self._lock = threading.Lock()

    def complete(self, messages: Sequence[Mapping[str, Any]]) -> Completion:
        """Send a conversation and return the model's next message.

        Raises:
            EndpointError: the endpoint cannot be used at all: wrong URL, model or key.
            RequestFailedError: this request failed, after all attempts.
        """
        for attempt in range(1, self._max_attempts + 1):
            try:
                return _completion(self._post(messages))
            except _TemporaryError as error:
                if attempt == self._max_attempts:
                    raise RequestFailedError(error.kind, str(error)) from error
                # Spread over half of the pause, so that threads do not come back together.
                growing = min(MAX_PAUSE_S, 2.0 ** (attempt - 1)) * random.uniform(0.5, 1)
                self._pause(min(MAX_PAUSE_S, max(growing, error.pause_s)))
        raise AssertionError("the last attempt returns or raises")

    def _post(self, messages: Sequence[Mapping[str, Any]]) -> Any:
        extra = self._extra
        data = json.dumps({"model": self.model, "messages": list(messages), **extra}).encode()
        request = urllib.request.Request(self.url, data, self._headers)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                return _read_json(response)
        except urllib.error.HTTPError as error:
            with error:
                text = self._error_text(error)
            if error.code == 400 and "temperature" in text and extra:
                with self._lock:
                    self._extra = {}  # some models accept their own default only
                return self._post(messages)
            self._raise_for(error, text)
        except TimeoutError as error:
            raise self._timeout() from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise self._timeout() from error
            raise _TemporaryError("no connection", f"{self.url}: {error}") from error

    def _timeout(self) -> _TemporaryError:
        return _TemporaryError("timeout", f"{self.url}: no answer within {self._timeout_s:g} s")

    def _error_text(self, error: urllib.error.HTTPError) -> str:
        """Return the start of an error body, without the key, which some servers repeat."""
        try:
            text = error.read(4096).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        return shorten(text.replace(self._key, "***") if self._key else text)

    def _raise_for(self, error: urllib.error.HTTPError, text: str) -> NoReturn:
        kind, message = f"HTTP {error.code}", f"{self.url}: HTTP {error.code}: {text}"
        if error.code in TEMPORARY or error.code >= 500:
            raise _TemporaryError(kind, message, _retry_after(error.headers.get("Retry-After")))
        if error.code in UNUSABLE or error.code < 400:
            raise EndpointError(f"{message}; check the URL, the name of the model and the key")
        raise RequestFailedError(kind, message)


class _TemporaryError(RequestFailedError):
    def __init__(self, kind: str, text: str, pause_s: float = 0.0) -> None:
        super().__init__(kind, text)
        self.pause_s = pause_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _retry_after(header: str | None) -> float:
    """Return the seconds of ``Retry-After``; 0 if it is missing or a date."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0


def _read_json(response: IO[bytes]) -> Any:
    body = response.read(MAX_RESPONSE_BYTES + 1)
    try:
        if len(body) > MAX_RESPONSE_BYTES:
            raise ValueError(f"it is longer than {MAX_RESPONSE_BYTES} bytes")
        return json.loads(body)
    except ValueError as error:  # a proxy's page, or a body that was cut off
        raise _TemporaryError("malformed response", f"the body is no JSON: {error}") from error


def _completion(body: Any) -> Completion:
    """Read the first choice of a response."""
    try:
        choice = body["choices"][0]
        message, usage = choice["message"], body.get("usage") or {}
        text, refusal = message.get("content"), message.get("refusal")
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        text = shorten(json.dumps(body))
        raise _TemporaryError("malformed response", f"it has no choice: {text}") from error
    if refusal or choice.get("finish_reason") == "content_filter":
        raise RequestFailedError("refusal", shorten(str(refusal or "content filter")))
    if not isinstance(text, str):
        raise _TemporaryError("malformed response", f"the content is {shorten(repr(text))}")
    counts = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
    return Completion(text, *(n if isinstance(n, int) and n > 0 else 0 for n in counts))
