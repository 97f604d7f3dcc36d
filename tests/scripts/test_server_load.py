"""The load test: its numbers, its checks, and seconds of load against both servers."""

import io
import json

import pytest
from PIL import Image

from coprs_deploy.bench.http_traffic import Exchange
from tests.scripts import load_script

load = load_script("benchmarks/server_load.py")


def exchange(due_s, latency_s=0.1, outcome="answered", kind="json", num_open=1, error=""):
    return Exchange(kind, outcome, due_s, 0.5, 1e3 * latency_s, num_open, error)


def test_level_leaves_out_the_warm_up_and_what_ends_later():
    early = [exchange(due / 10, 5.0) for due in range(20)]  # due in the first fifth
    steady = [exchange(2 + due / 10, 0.2) for due in range(80)]
    record = load.level_record(
        [*early, *steady, exchange(3.0, kind="abort", outcome="left")], 9, 10
    )
    assert record["n"] == 80
    assert record["offered_per_s"] == pytest.approx(10)
    # 20 early ones end between 5 s and 7 s; two of the steady ones end after 10 s.
    assert record["answered_per_s"] == pytest.approx((20 + 78) / 8, abs=0.2)
    assert record["p50"] == record["p99"] == pytest.approx(200)
    assert record["outcomes"] == {"answered": 100, "left": 1}
    assert not record["is_saturated"]


def test_level_with_a_growing_queue_or_refusals_is_saturated():
    growing = [exchange(due / 10, due / 10) for due in range(100)]
    assert load.level_record(growing, 10, 10)["is_saturated"]
    refused = [exchange(due / 10) for due in range(99)] + [exchange(5, outcome="refused")]
    assert load.level_record(refused, 10, 10)["is_saturated"]


def test_refusals_are_early_below_the_queue_size():
    full = exchange(5.0, outcome="refused", num_open=9)
    early = exchange(5.0, outcome="refused", num_open=8)
    left = exchange(4.5, outcome="left", kind="abort")
    assert load.num_early_refusals([full], 8) == 0
    assert load.num_early_refusals([early], 8) == 1
    assert load.num_early_refusals([early, left], 8) == 0  # the server may still count it
    record = load.level_record([full], 9, 10)
    assert load.load_failures(record, [early], 8) == [
        "at 9.00/s: 1 requests were refused before the queue was full"
    ]


def test_failures_name_lost_requests_and_a_queue_without_limit():
    exchanges = [exchange(1, outcome="lost", error="json: EOF"), exchange(2, num_open=19)]
    record = load.level_record(exchanges, 3, 10)
    assert load.load_failures(record, exchanges, 8) == [
        "at 3.00/s: 1 or more requests were lost: json: EOF",
        "at 3.00/s: 19 requests were open, and none was refused",
    ]
    assert load.memory_failures(0.021, [], 5)[0].startswith("memory grew by 2.1%")
    assert load.memory_failures(float("nan"), [], 5)
    assert load.memory_failures(0.02, ["json: EOF"], 5) == ["1 of 5 requests were lost: json: EOF"]
    assert load.memory_failures(-0.5, [], 5) == []


def test_slope_ignores_the_first_half_and_single_peaks():
    seconds = list(range(100))
    flat = [100 * n for n in range(50)] + [5000] * 50
    flat[60] = flat[80] = 20_000
    assert load.slope_growth(seconds, flat) == (0, 0)
    rising = [10_000 + 10 * n for n in range(100)]
    slope, growth = load.slope_growth(seconds, rising)
    assert slope == pytest.approx(10)
    assert growth == pytest.approx(490 / 10_745)
    with pytest.raises(ValueError, match="9 samples"):
        load.slope_growth(seconds[:9], flat[:9])


def test_queries_have_the_sizes_of_the_mix_and_are_different():
    queries = load.make_queries(20, 0)
    sizes = {Image.open(io.BytesIO(query.image)).size for query in queries}
    assert len(sizes) > 1 and sizes <= set(load.SIZES)
    assert len({query.image for query in queries}) == 20
    assert [q.image for q in load.make_queries(3, 0)] == [q.image for q in queries[:3]]


@pytest.fixture
def short(monkeypatch):
    """Seconds instead of minutes; thirty times the capacity in one second fills every queue."""
    monkeypatch.setattr(load, "CALIBRATION_S", 1.0)
    monkeypatch.setattr(load, "HIGHEST", 30.0)
    monkeypatch.setattr(load, "SIZES", {(128, 128): 3, (640, 480): 1})
    monkeypatch.setattr(load, "slope_growth", lambda *_: (0.0, 0.0))  # seconds show no slope


@pytest.mark.extended
def test_overload_is_refused_and_leaves_nothing_behind(short, tmp_path):
    arguments = ["--seconds", "1", "--levels", "2", "--max-queue-size", "2", "--no-peer"]
    assert load.main(["--out", str(tmp_path), *arguments]) == 0
    (path,) = tmp_path.glob("server-load-*.json")
    levels = json.loads(path.read_text("utf-8"))["load"]["levels"][load.OURS]
    assert levels[-1]["is_saturated"] and levels[-1]["outcomes"]["refused"] > 0
    assert all(level["lost"] == [] for level in levels)
    assert all(level["resident_bytes"] > 50_000_000 for level in levels)
    assert "| saturated |" in path.with_suffix(".md").read_text("utf-8")
    with Image.open(path.with_suffix(".png")) as chart:
        assert chart.width > chart.height


def test_requests_in_time_are_answered_within_the_deadline_and_due_after_the_warm_up():
    early = [exchange(1.0, 0.1)]  # due in the first fifth
    due = [exchange(3.0, 0.1), exchange(4.0, 0.3), exchange(5.0, 0.01, outcome="rejected")]
    assert load.in_time([*early, *due], 200.0, 10) == pytest.approx(1 / 3)
    assert load.in_time(early, 200.0, 10) == 0.0


@pytest.mark.extended
def test_deadlines_are_met_or_refused_at_once(short, monkeypatch, tmp_path):
    monkeypatch.setattr(load, "DEADLINE_RATES", (5.0,))  # some requests in seconds, however slow
    arguments = ["--part", "deadlines", "--seconds", "2", "--deadline-ms", "1,60000", "--no-peer"]
    assert load.main(["--out", str(tmp_path), *arguments]) == 0
    (path,) = tmp_path.glob("server-load-*.json")
    levels = json.loads(path.read_text("utf-8"))["deadlines"]["levels"]
    without, short_one, long_one = levels
    assert [level["deadline_ms"] for level in levels] == [None, 1.0, 60_000.0]
    assert "in_time" not in without and without["outcomes"]["answered"] > 0
    assert set(short_one["outcomes"]) == {"rejected"} and short_one["in_time"] == 0
    assert long_one["in_time"] > 0
    assert "| in time |" in path.with_suffix(".md").read_text("utf-8")


@pytest.mark.peer
@pytest.mark.extended
def test_both_servers_answer_the_same_masks_to_mixed_requests(short, tmp_path):
    arguments = ["--part", "memory", "--minutes", "0.05", "--max-queue-size", "64"]
    assert load.main(["--out", str(tmp_path), *arguments]) == 0
    (path,) = tmp_path.glob("server-load-*.json")
    memory = json.loads(path.read_text("utf-8"))["memory"]
    assert memory["agreement"] > 0.9
    assert memory["servers"].keys() == {load.OURS, load.PEER}
    for record in memory["servers"].values():
        assert record["lost"] == []
        assert min(record["resident_bytes"]) > 50_000_000
    assert "growth of the last half" in path.with_suffix(".md").read_text("utf-8")


def test_server_that_ends_is_reported_with_its_last_line():
    ending = load.serving(["-c", "raise SystemExit('no such thing')"])
    with pytest.raises(RuntimeError, match="does not listen: no such thing"), ending:
        pass
