"""The soak test: its numbers, its bodies, and a short run against a real server."""

import io
import json

import pytest
from PIL import Image

from tests.scripts import load_script

soak = load_script("benchmarks/soak.py")

PASSED = {
    "requests": 12,
    "seconds": 60.0,
    "outcomes": {"answered": 10, "left": 2, "lost": 0},
    "lost": [],
    "growth_of_last_half": 0.01,
    "resident_bytes": [400_000_000, 600_000_000, 500_000_000],
    "latency_ms": {"json": {"n": 10, "p50": 20.0, "p90": 30.0, "p99": 1500.0, "max": 1500.0}},
}


def test_growth_compares_the_ends_of_the_last_half():
    warming = [100 * n for n in range(1, 51)]
    flat = [5000] * 40 + [5100] * 10
    assert soak.growth_of_last_half(warming + flat) == pytest.approx(0.02)
    assert soak.growth_of_last_half(warming + [5000] * 50) == 0
    peaks = [5000, 9000, 5000, 5000, 5000] * 10
    assert soak.growth_of_last_half(warming + peaks) == 0
    with pytest.raises(ValueError, match="9 samples"):
        soak.growth_of_last_half([1] * 9)


def test_percentiles_are_measured_values():
    found = soak.percentiles(list(range(1, 101)))
    assert found == {"n": 100, "p50": 51, "p90": 91, "p99": 100, "max": 100}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"growth_of_last_half": 0.021}, "memory grew by 2.1% over the last half; accepted: 2%"),
        ({"growth_of_last_half": float("nan")}, "memory grew by nan%"),
        (
            {"outcomes": {"answered": 11, "lost": 1}, "lost": ["json: timed out"]},
            "1 of 12 requests were lost: json: timed out",
        ),
    ],
)
def test_failures_name_growth_and_lost_requests(changes, message):
    assert soak.failures(PASSED) == []
    (line,) = soak.failures({**PASSED, **changes})
    assert line.startswith(message)


def test_summary_has_the_counts_the_memory_and_p99():
    text = "\n".join(soak.summary(PASSED))
    assert "12 requests in 60 s: 10 answered, 2 left, 0 lost" in text
    assert "400 MB at first, 600 MB at most, 500 MB at the end; +1.00% over the last half" in text
    assert "p99 1.50 s" in text


def test_last_event_of_a_cut_stream_is_refused():
    whole = 'event: text\ndata: {"text": "a"}\n\nevent: result\ndata: {"found": true}\n\n'
    assert soak.last_event(whole) == ("result", {"found": True})
    for cut in (whole[:-1], whole[:-30], ""):
        with pytest.raises(soak.UnexpectedResponseError, match="in the middle"):
            soak.last_event(cut)


@pytest.mark.parametrize("size", soak.SIZES)
def test_images_have_their_size(size):
    assert Image.open(io.BytesIO(soak.draw_image(*size, 0))).size == size


def test_failed_requests_are_lost_and_not_timed():
    log = soak.Log()
    for error in (ConnectionResetError("reset"), soak.UnexpectedResponseError("status 500")):

        def fail(error=error):
            raise error

        log.record("json", fail)
    log.record("json", lambda: "answered")
    log.record("abort", lambda: "left")
    assert log.outcomes == {"lost": 2, "answered": 1, "left": 1}
    assert log.lost[0] == "json: ConnectionResetError: reset"
    assert [len(found) for found in log.latencies_ms.values()] == [1]


@pytest.mark.slow
@pytest.mark.extended
def test_short_run_loses_no_request(tmp_path):
    seconds = 6
    with soak.serving(None) as (server, address):
        report = soak.soak(address, server, seconds, 2)
        assert server.is_running()
    assert report["lost"] == []
    assert report["requests"] == sum(report["outcomes"].values())
    assert report["outcomes"]["answered"] > 0
    assert report["seconds"] >= seconds
    assert min(report["resident_bytes"]) > 50_000_000
    json.dumps(report)
    assert not server.is_running()
