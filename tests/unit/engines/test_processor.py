"""What is read of the processor, on systems that tell and on those that do not."""

from pathlib import Path

import pytest

from coprs_deploy.engines.processor import Processor, describe_processor

CPUINFO = """processor\t: 0
model name\t: A Processor
flags\t\t: fpu avx2 {}

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


@pytest.mark.parametrize("unit", ["avx512_vnni", "avx_vnni", "amx_int8"])
def test_int8_units_are_found(unit, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: CPUINFO.format(unit))
    found = describe_processor()
    assert found.name == "A Processor"
    assert found.units == ("fpu", "avx2", unit)
    assert found.has_int8_units


def test_a_processor_without_them_has_none(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: CPUINFO.format("fma"))
    assert not describe_processor().has_int8_units


def test_a_system_that_tells_nothing_still_has_a_name(monkeypatch):
    def refuse(self, encoding):
        raise OSError

    monkeypatch.setattr(Path, "read_text", refuse)
    found = describe_processor()
    assert found.name and found.units == () and found.cores > 0


def test_it_is_a_record():
    found = describe_processor()
    assert Processor.from_json(found.to_json()) == found
