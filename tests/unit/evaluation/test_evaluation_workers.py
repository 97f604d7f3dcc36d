"""Shares and devices of worker processes."""

import os

from coprs_deploy.cli.evaluation_workers import make_shares, worker_options
from coprs_deploy.runtime import RuntimeOptions


def test_shares_keep_images_whole_and_cover_every_example_once():
    pending = [(0, [[0, 4], [1], [2, 3]]), (1, [[0], [1, 2]])]
    shares = make_shares(pending, 2)
    assert shares == [[(0, [0, 4, 2, 3]), (1, [0])], [(0, [1]), (1, [1, 2])]]
    assert make_shares(pending, 1) == [[(0, [0, 4, 1, 2, 3]), (1, [0, 1, 2])]]
    assert len(make_shares(pending, 8)) == 3, "workers without an image are left out"
    assert make_shares([(0, []), (1, [])], 2) == []


def test_workers_have_a_gpu_each():
    found = [worker_options(RuntimeOptions(device="cuda"), number, 3) for number in range(3)]
    assert [each.device for each in found] == ["cuda:0", "cuda:1", "cuda:2"]
    mixed = worker_options(RuntimeOptions(device="cuda:1", policy_device="cuda"), 2, 3)
    assert (mixed.device, mixed.policy_device) == ("cuda:1", "cuda:2")


def test_workers_share_the_cores_unless_a_number_is_given():
    cores = len(os.sched_getaffinity(0))
    assert worker_options(RuntimeOptions(), 1, 2).num_threads == max(1, cores // 2)
    assert worker_options(RuntimeOptions(num_threads=3), 1, 2).num_threads == 3
    assert worker_options(RuntimeOptions(), 0, 1) == RuntimeOptions()
