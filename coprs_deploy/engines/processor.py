"""The processor of this machine: name, vector units, and the cores that this process may use."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from coprs_deploy.specs import Record

INT8_UNITS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
"""Instruction sets that add up int8 products in 32 bits. Without one of them some libraries add two
products in 16 bits first, where the sum may not fit."""


class Processor(Record, frozen=True):
    """What the system says of its processor.

    Attributes:
        name: as it is sold; the architecture where the system does not tell.
        units: its instruction sets, as Linux names them; empty where the system does not tell.
        cores: that this process may use.
    """

    name: str
    units: tuple[str, ...]
    cores: int

    @property
    def has_int8_units(self) -> bool:
        """Whether int8 products are exact in every runtime."""
        return not INT8_UNITS.isdisjoint(self.units)


def describe_processor() -> Processor:
    """Read ``/proc/cpuinfo``, or what else the system tells."""
    described: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        field, _, value = line.partition(":")
        described.setdefault(field.strip(), value.strip())
    return Processor(
        name=described.get("model name") or platform.processor() or platform.machine(),
        units=tuple(described.get("flags", described.get("Features", "")).split()),
        cores=len(os.sched_getaffinity(0)),
    )
