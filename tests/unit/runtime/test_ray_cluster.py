"""Options of a Ray cluster: number of replicas, their resources, and Ray that is not installed."""

import sys

import pytest

from coprs_deploy.errors import MissingDependencyError
from coprs_deploy.runtime import RuntimeOptions
from coprs_deploy.runtime.ray_cluster import (
    RayOptions,
    connect,
    read_ray_options,
    replica_resources,
)


@pytest.mark.parametrize(
    ("text", "expected"), [(None, (1, 1)), ("3", (3, 3)), ("2:8", (2, 8)), ("1:1", (1, 1))]
)
def test_replicas_are_read(text, expected):
    found = read_ray_options(text, "head:6379")
    assert found == RayOptions(*expected, "head:6379")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "accepted: MIN:MAX"),
        ("2:", "accepted: MIN:MAX"),
        (":2", "accepted: MIN:MAX"),
        ("a:b", "accepted: MIN:MAX"),
        ("-1", "accepted: MIN:MAX"),
        ("0", "min_replicas is 0"),
        ("3:2", "max_replicas is 2; it must be at least 3"),
    ],
)
def test_other_replicas_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_ray_options(text, None)


@pytest.mark.parametrize(
    ("options", "cores", "gpus"),
    [
        (RuntimeOptions(), 1, 0),
        (RuntimeOptions(num_threads=4), 4, 0),
        (RuntimeOptions(device="cuda"), 1, 1),
        (RuntimeOptions(policy_device="cuda:1", num_threads=4), 1, 1),
        (RuntimeOptions(policy="vllm"), 1, 1),
    ],
)
def test_replica_has_a_gpu_or_its_threads(options, cores, gpus):
    assert options.is_on_cpu == (not gpus)
    assert replica_resources(options) == {"num_cpus": cores, "num_gpus": gpus}


def test_missing_ray_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r'pip install -e "\.\[ray\]"'):
        connect(None)
