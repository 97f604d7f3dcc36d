"""``Client`` and ``AsyncClient``: requests to a server with retries, and streams of events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import TYPE_CHECKING, Any, Self, Unpack

from coprs_deploy.client.request import (
    CONNECT_TIMEOUT_S,
    MAX_EVENT_BYTES,
    ClientOptions,
    RemoteEvent,
    RemoteImage,
    error_of_connection,
    error_of_response,
    import_httpx,
    read_event,
    read_results,
    segment_form,
)
from coprs_deploy.client.result import RemoteResult
from coprs_deploy.closing import Closeable
from coprs_deploy.errors import EndpointError

if TYPE_CHECKING:
    import httpx2

    from coprs_deploy.runtime.options import RequestLimits

JSON, EVENT_STREAM = {"Accept": "application/json"}, {"Accept": "text/event-stream"}


class Client(Closeable):
    """Client of ``coprs-deploy serve``; a context manager, which may be used by several threads.

    Args:
        url: address of the server, such as ``http://127.0.0.1:8000``.
        api_key: key of the server; None takes ``COPRS_API_KEY``.
        timeout_s: how long the server may send nothing, in seconds.
        max_retries: retries of a request when the server is busy (``Retry-After`` is respected) or
            the connection fails. A stream is not repeated once it has begun.
        backoff_s: pause before the first retry in seconds, doubled for each further one.
        http_client: an ``httpx2.Client`` with settings of its own (proxy, certificates); closing
            it is left to the caller.

    Raises:
        ValueError: an argument is not accepted.
        MissingDependencyError: httpx2 is not installed.
    """

    def __init__(
        self,
        url: str = ClientOptions.url,
        *,
        api_key: str | None = None,
        timeout_s: float = ClientOptions.timeout_s,
        max_retries: int = ClientOptions.max_retries,
        backoff_s: float = ClientOptions.backoff_s,
        http_client: httpx2.Client | None = None,
    ) -> None:
        self._options = ClientOptions(url, api_key, timeout_s, max_retries, backoff_s)
        self._httpx = import_httpx()
        self._is_owned = http_client is None
        self._http: httpx2.Client = http_client or self._httpx.Client()

    def segment(
        self,
        image: RemoteImage,
        instruction: str,
        max_targets: int = 1,
        max_new_tokens: int | None = None,
        **limits: Unpack[RequestLimits],
    ) -> RemoteResult:
        """Segment what an instruction describes.

        Args:
            image: path or bytes of an image file, or a Pillow image or an array as
                :meth:`CoPRS.segment` takes them.
            instruction: what to segment.
            max_targets: maximum number of targets, one mask each.
            max_new_tokens: token budget of the response; None takes the checkpoint's.
            limits: ``max_reasoning_tokens``, ``deadline_ms`` or ``reasoning``, as of
                :meth:`CoPRS.segment`.

        Returns:
            The result; its masks are decoded when they are read.

        Raises:
            ImageError, InstructionError, ValueError: the server refuses an argument.
            QueueFullError: the server is busy, after all retries.
            RequestTimeoutError: the server exceeded its time limit, or sent nothing for long.
            EndpointError: it cannot be reached, refuses the key, or is no such server.
            CoPRSError: it failed in another way.
        """
        options = {"max_targets": max_targets, "max_new_tokens": max_new_tokens, **limits}
        form = segment_form(image, instruction, options)
        response = self._request("POST", "segment", headers=JSON, **form)
        return RemoteResult.from_json(self._read(response))

    def segment_instructions(
        self,
        image: RemoteImage,
        instructions: Sequence[str],
        max_targets: int = 1,
        max_new_tokens: int | None = None,
        **limits: Unpack[RequestLimits],
    ) -> list[RemoteResult | Exception]:
        """Segment by several instructions on one image, which is sent and encoded once.

        Returns:
            The result of each instruction, or its error, in their order. What fails for all raises
            as in :meth:`segment`.
        """
        options = {"max_targets": max_targets, "max_new_tokens": max_new_tokens, **limits}
        form = segment_form(image, list(instructions), options)
        return read_results(self._read(self._request("POST", "segment", headers=JSON, **form)))

    def stream(
        self,
        image: RemoteImage,
        instruction: str,
        max_targets: int = 1,
        max_new_tokens: int | None = None,
        **limits: Unpack[RequestLimits],
    ) -> Generator[RemoteEvent, None, None]:
        """Stream the events of a request; arguments and errors as in :meth:`segment`.

        Yields:
            ``TextDelta`` as the policy writes, ``RemotePrior`` unless nothing was found, and the
            ``RemoteResult``. Closing the generator cancels the request.
        """
        options = {"max_targets": max_targets, "max_new_tokens": max_new_tokens, **limits}
        form = segment_form(image, instruction, options)
        response = self._request("POST", "segment", headers=EVENT_STREAM, **form)
        event: RemoteEvent | None = None
        try:
            for sent in self._httpx.EventSource(response, MAX_EVENT_BYTES):
                event = read_event(sent.event, sent.data)
                if event is not None:
                    yield event
        except self._httpx.TransportError as error:
            raise error_of_connection(self._options, str(response.url), error) from error
        finally:
            response.close()
        _check_ended(event, str(response.url))

    def health(self) -> dict[str, Any]:
        """Return the state of the server: ``status``, ``version``, ``runtime``, requests."""
        return self._read(self._request("GET", "health", headers=JSON))

    def close(self) -> None:
        """Close the connections."""
        if self._is_owned:
            self._http.close()

    def _read(self, response: httpx2.Response) -> dict[str, Any]:
        try:
            return _json(response.url, response.read())
        except self._httpx.TransportError as error:
            raise error_of_connection(self._options, str(response.url), error) from error
        finally:
            response.close()

    def _request(self, method: str, path: str, **content: Any) -> httpx2.Response:
        """Send a request until it succeeds or is not worth repeating; return its open response."""
        options, url = self._options, self._options.endpoint(path)
        headers = options.headers | content.pop("headers")
        timeout = self._httpx.Timeout(options.timeout_s, connect=CONNECT_TIMEOUT_S)
        attempt = 0
        while True:
            request = self._http.build_request(
                method, url, headers=headers, timeout=timeout, **content
            )
            try:
                response = self._http.send(request, stream=True)
                if response.is_success:
                    return response
                body = response.read()
                response.close()
                pause_s = options.pause_s(attempt, response)
                failure = error_of_response(url, response.status_code, body)
            except self._httpx.TransportError as error:
                pause_s = options.pause_s(attempt, error)
                failure = error_of_connection(options, url, error)
                failure.__cause__ = error
            if pause_s < 0:
                raise failure
            time.sleep(pause_s)
            attempt += 1


class AsyncClient:
    """Asynchronous :class:`Client`, with the same arguments: ``async with AsyncClient() as c``.

    Images are read and encoded in threads.
    """

    def __init__(
        self,
        url: str = ClientOptions.url,
        *,
        api_key: str | None = None,
        timeout_s: float = ClientOptions.timeout_s,
        max_retries: int = ClientOptions.max_retries,
        backoff_s: float = ClientOptions.backoff_s,
        http_client: httpx2.AsyncClient | None = None,
    ) -> None:
        self._options = ClientOptions(url, api_key, timeout_s, max_retries, backoff_s)
        self._httpx = import_httpx()
        self._is_owned = http_client is None
        self._http: httpx2.AsyncClient = http_client or self._httpx.AsyncClient()

    async def segment(
        self,
        image: RemoteImage,
        instruction: str,
        max_targets: int = 1,
        max_new_tokens: int | None = None,
        **limits: Unpack[RequestLimits],
    ) -> RemoteResult:
        """Asynchronous :meth:`Client.segment`; cancelling the task cancels the request."""
        options = {"max_targets": max_targets, "max_new_tokens": max_new_tokens, **limits}
        form = await asyncio.to_thread(segment_form, image, instruction, options)
        response = await self._request("POST", "segment", headers=JSON, **form)
        return RemoteResult.from_json(await self._read(response))

    async def segment_instructions(
        self,
        image: RemoteImage,
        instructions: Sequence[str],
        max_targets: int = 1,
        max_new_tokens: int | None = None,
        **limits: Unpack[RequestLimits],
    ) -> list[RemoteResult | Exception]:
        """Asynchronous :meth:`Client.segment_instructions`."""
        options = {"max_targets": max_targets, "max_new_tokens": max_new_tokens, **limits}
        form = await asyncio.to_thread(segment_form, image, list(instructions), options)
        response = await self._request("POST", "segment", headers=JSON, **form)
        return read_results(await self._read(response))

    async def stream(
        self,
        image: RemoteImage,
        instruction: str,
        max_targets: int = 1,
        max_new_tokens: int | None = None,
        **limits: Unpack[RequestLimits],
    ) -> AsyncGenerator[RemoteEvent, None]:
        """Asynchronous :meth:`Client.stream`."""
        options = {"max_targets": max_targets, "max_new_tokens": max_new_tokens, **limits}
        form = await asyncio.to_thread(segment_form, image, instruction, options)
        response = await self._request("POST", "segment", headers=EVENT_STREAM, **form)
        event: RemoteEvent | None = None
        try:
            async for sent in self._httpx.EventSource(response, MAX_EVENT_BYTES):
                event = read_event(sent.event, sent.data)
                if event is not None:
                    yield event
        except self._httpx.TransportError as error:
            raise error_of_connection(self._options, str(response.url), error) from error
        finally:
            await response.aclose()
        _check_ended(event, str(response.url))

    async def health(self) -> dict[str, Any]:
        """Asynchronous :meth:`Client.health`."""
        return await self._read(await self._request("GET", "health", headers=JSON))

    async def aclose(self) -> None:
        """Close the connections."""
        if self._is_owned:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def _read(self, response: httpx2.Response) -> dict[str, Any]:
        try:
            return _json(response.url, await response.aread())
        except self._httpx.TransportError as error:
            raise error_of_connection(self._options, str(response.url), error) from error
        finally:
            await response.aclose()

    async def _request(self, method: str, path: str, **content: Any) -> httpx2.Response:
        """Send a request until it succeeds or is not worth repeating; return its open response."""
        options, url = self._options, self._options.endpoint(path)
        headers = options.headers | content.pop("headers")
        timeout = self._httpx.Timeout(options.timeout_s, connect=CONNECT_TIMEOUT_S)
        attempt = 0
        while True:
            request = self._http.build_request(
                method, url, headers=headers, timeout=timeout, **content
            )
            try:
                response = await self._http.send(request, stream=True)
                if response.is_success:
                    return response
                body = await response.aread()
                await response.aclose()
                pause_s = options.pause_s(attempt, response)
                failure = error_of_response(url, response.status_code, body)
            except self._httpx.TransportError as error:
                pause_s = options.pause_s(attempt, error)
                failure = error_of_connection(options, url, error)
                failure.__cause__ = error
            if pause_s < 0:
                raise failure
            await asyncio.sleep(pause_s)
            attempt += 1


def _json(url: httpx2.URL, content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except ValueError as error:
        raise EndpointError(f"{url} sent no JSON; is it coprs-deploy serve?") from error
    return data if isinstance(data, dict) else {}


def _check_ended(event: RemoteEvent | None, url: str) -> None:
    if not isinstance(event, RemoteResult):
        raise EndpointError(f"{url} ended the stream before the result; repeat the request")
