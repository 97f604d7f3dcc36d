"""Probes of a server that stops, and TLS, over real sockets."""

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import subprocess

import pytest

from coprs_deploy.cli.serve import check_tls
from coprs_deploy.server.app import build_app
from coprs_deploy.server.process import DrainingServer, ProcessOptions
from coprs_deploy.server.request_log import ACCESS_LOGGER
from tests.unit.runtime_fakes import WAIT, FakePolicy, join_stream_threads
from tests.unit.server.asgi import MAX_BYTES, form


@contextlib.asynccontextmanager
async def running(app, **options):
    """Run a server inside the block; yields it and its port."""
    server = DrainingServer(app, ProcessOptions(**options))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.ensure_future(server._serve(sockets=[listener]))
        async with asyncio.timeout(WAIT):
            while not server.started:
                await asyncio.sleep(0.01)
            yield server, listener.getsockname()[1]
            server.should_exit = True
            await serving


async def get(port, path, tls=None, header="Accept: */*"):
    """Return status and body of a response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: a\r\n{header}\r\nConnection: close\r\n\r\n".encode()
    )
    answer = await reader.read()
    writer.close()
    return int(answer.split()[1]), answer


class TestDrain:
    def test_ready_turns_to_503_before_the_end_of_accepting(self, build):
        app = build_app(build()[0], MAX_BYTES)

        async def stop():
            async with running(app, drain_s=WAIT) as (server, port):
                before = await get(port, "/health/ready")
                server.handle_exit(signal.SIGTERM, None)
                during = [await get(port, f"/health{name}") for name in ("/ready", "/live", "")]
                assert not server.should_exit
                server.handle_exit(signal.SIGTERM, None)  # the second one ends the wait
                while server.servers[0].is_serving():
                    await asyncio.sleep(0.01)
                return before, during

        before, during = asyncio.run(stop())
        assert before[0] == 200
        assert [status for status, _ in during] == [503, 200, 200]
        assert all(b'"status":"stopping"' in answer for _, answer in during)

    def test_accepting_ends_after_the_drain(self, build):
        app = build_app(build()[0], MAX_BYTES)

        async def stop():
            async with running(app, drain_s=0.05) as (server, port):
                server.handle_exit(signal.SIGTERM, None)
                while server.servers[0].is_serving():
                    await asyncio.sleep(0.01)
                with pytest.raises(OSError):
                    await get(port, "/health")

        asyncio.run(stop())

    def test_ready_of_a_closed_runtime_is_503(self, build):
        coprs, _ = build()
        app = build_app(coprs, MAX_BYTES)

        async def close():
            async with running(app) as (_, port):
                coprs.close()
                return await get(port, "/health/ready"), await get(port, "/health/live")

        ready, live = asyncio.run(close())
        assert (ready[0], live[0]) == (503, 200)
        assert b'"status":"closed"' in ready[1]


def test_log_has_the_address_of_the_connection(build, caplog):
    app = build_app(build()[0], MAX_BYTES)

    async def ask():
        async with running(app) as (_, port):
            await get(port, "/nowhere", header="X-Forwarded-For: 192.0.2.1")

    with caplog.at_level(logging.INFO, logger=ACCESS_LOGGER):
        asyncio.run(ask())
    (record,) = (each for each in caplog.records if each.name == ACCESS_LOGGER)
    assert record.fields["client"] == "127.0.0.1"


class TestSlowClients:
    def test_stream_that_is_not_read_ends_its_request(self, build):
        policy = FakePolicy(deltas=("x" * 100_000,) * 500)  # more than the buffers of a socket
        coprs, _ = build(policy)
        app = build_app(coprs, MAX_BYTES, stall_timeout_s=0.3)
        content = form()
        head = (
            "POST /segment HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )

        async def stall():
            async with running(app) as (_, port):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(head.encode() + content)
                is_abandoned = await asyncio.to_thread(policy.was_abandoned.wait, WAIT)
                health = await get(port, "/metrics")
                writer.close()
                return is_abandoned, health

        is_abandoned, (status, metrics) = asyncio.run(stall())
        assert is_abandoned
        assert status == 200
        assert b'coprs_failures_total{type="ClientStalled"} 1.0' in metrics
        join_stream_threads()
        assert coprs.num_active == 0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Make a certificate for localhost."""
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-subj", "/CN=localhost"]
    command += ["-out", paths[0], "-keyout", paths[1]]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl")
    return paths


class TestTls:
    def test_https_is_served(self, build, certificate):
        cert, key = certificate
        check_tls(cert, key)
        app = build_app(build()[0], MAX_BYTES)
        trusting = ssl.create_default_context(cafile=cert)
        trusting.check_hostname = False

        async def ask():
            async with running(app, tls_cert=cert, tls_key=key) as (_, port):
                answered = await get(port, "/health", trusting)
                with pytest.raises(ssl.SSLCertVerificationError):
                    await get(port, "/health", ssl.create_default_context())
                return answered

        assert asyncio.run(ask())[0] == 200

    def test_files_that_cannot_be_used_are_refused(self, certificate, tmp_path):
        cert, key = certificate
        other = tmp_path / "other.pem"
        other.write_text("no certificate")
        for given, part in (
            ((other, key), "cannot be used for TLS"),
            ((cert, other), "cannot be used for TLS"),
            ((cert, None), "cannot be used for TLS"),
            ((tmp_path / "none.pem", key), "is no file"),
            ((None, key), "with --tls-cert only"),
        ):
            with pytest.raises(ValueError, match=part):
                check_tls(*given)
