"""Processor, memory and versions, with and without ``/proc``."""

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from coprs_deploy.machine import (
    PACKAGES,
    TOOLCHAIN,
    Processor,
    available_memory_bytes,
    describe_processor,
    environment,
    installed_versions,
    peak_memory_bytes,
)

CPUINFO = """processor\t: 0
model name\t: A Processor
flags\t\t: fpu avx2 {}

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


@pytest.mark.parametrize("unit", ["avx512_vnni", "avx_vnni", "amx_int8"])
def test_processor_int8_instructions_are_found(unit, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: CPUINFO.format(unit))
    found = describe_processor()
    assert found.name == "A Processor"
    assert found.units == ("fpu", "avx2", unit)
    assert found.has_int8_units


def test_processor_name_has_family_and_model_where_the_system_gives_them(monkeypatch):
    text = CPUINFO.replace("model name", "cpu family\t: 25\nmodel\t\t: 17\nmodel name", 1)
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: text.format("fma"))
    assert describe_processor().name == "A Processor (family 25, model 17)"


def test_processor_without_int8_instructions_has_none(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: CPUINFO.format("fma"))
    assert not describe_processor().has_int8_units


@pytest.fixture
def unreadable_proc(monkeypatch):
    def refuse(self, encoding):
        raise OSError

    monkeypatch.setattr(Path, "read_text", refuse)


@pytest.mark.usefixtures("unreadable_proc")
def test_processor_without_proc_has_name_and_cores():
    found = describe_processor()
    assert found.name and found.units == () and found.cores > 0


def test_processor_survives_json():
    found = describe_processor()
    assert Processor.from_json(found.to_json()) == found


def test_peak_memory_covers_written_array():
    before = peak_memory_bytes()
    array = np.ones(200_000_000, np.uint8)
    assert peak_memory_bytes() >= array.nbytes
    assert peak_memory_bytes() >= before


def test_peak_memory_is_read_in_kibibytes(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: "VmPeak:\t9 kB\nVmHWM:\t  7 kB\n")
    assert peak_memory_bytes() == 7 * 1024


@pytest.mark.usefixtures("unreadable_proc")
def test_peak_memory_without_proc_uses_resource_usage():
    assert peak_memory_bytes() > 2**20


def test_available_memory_is_part_of_the_physical_memory():
    assert 0 < available_memory_bytes() <= psutil.virtual_memory().total


def test_installed_versions_contain_python_and_installed_packages():
    found = installed_versions()
    assert found["python"] == platform.python_version()
    assert found["numpy"] == np.__version__
    assert set(found) <= {"python", *PACKAGES}


def test_environment_contains_versions_machine_and_commit():
    found = environment()
    assert set(found) == {"versions", "python", "machine", "processor", "commit"}
    assert set(found["versions"]) <= {*TOOLCHAIN, "coprs-deploy"}
    assert found["versions"]["numpy"] == np.__version__


MAPPED_BY_A_BLOCK = """
import ctypes, sys
from coprs_deploy.machine import return_freed_blocks

class Statistics(ctypes.Structure):
    _fields_ = [(f"field_{i}", ctypes.c_size_t) for i in range(4)] + [
        ("mapped", ctypes.c_size_t)] + [(f"rest_{i}", ctypes.c_size_t) for i in range(5)]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Statistics
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "returned":
    return_freed_blocks()
libc.free(libc.malloc(30 << 20))
before = libc.mallinfo2().mapped
libc.malloc(8 << 20)
print(libc.mallinfo2().mapped - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
@pytest.mark.parametrize("setting", ["default", "returned"])
def test_freed_blocks_are_returned(setting):
    """glibc no longer maps a block of 8 MiB once a larger one was freed."""
    command = [sys.executable, "-c", MAPPED_BY_A_BLOCK, setting]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert (int(printed) >= 8 << 20) == (setting == "returned")
