"""Work of a graph against what the machine can do (Williams et al., 2009: the roofline model)."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from coprs_deploy.benchmarks.report import Ceilings, Work

MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
SMALLEST_SIDE = 256
LONGEST_PRODUCT_SECONDS = 0.5
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Large enough to leave every cache, small enough to be over soon."""

TORCH_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def against_ceiling(work: Work, ceilings: Ceilings, precision: str, milliseconds: float) -> Work:
    """Fill in what the ceilings allow, and how much of it was reached.

    A processor without units for a half precision computes such graphs in float32, so the faster
    of the two products counts there. Of a precision without a measured ceiling, as int8, nothing is
    said.
    """
    if precision not in ceilings.matmul_flops:
        return work
    rates = {
        name: ceilings.matmul_flops[name]
        for name in (precision, "fp32")
        if name in ceilings.matmul_flops
    }
    if not rates:
        return work
    ceiling = max(rates, key=lambda name: rates[name])
    compute, memory = work.flops / rates[ceiling], work.bytes / ceilings.copy_bytes
    least_ms = 1e3 * max(compute, memory)
    return msgspec.structs.replace(
        work,
        bound="compute" if compute >= memory else "memory",
        least_ms=float(f"{least_ms:.4g}"),
        share=float(f"{least_ms / milliseconds:.4g}"),
        ceiling=ceiling,
    )


def measure_ceilings(device: str, precision: str) -> dict[str, float]:
    """Time a large matrix product and a large copy with PyTorch; for a process of its own.

    Returns:
        ``flops`` and ``bytes``, both a second; a copy reads and writes.
    """
    import torch

    kind = device.partition(":")[0]
    dtype = getattr(torch, TORCH_TYPES[precision])
    torch.backends.cuda.matmul.allow_tf32 = False

    def multiply(side: int) -> Callable[[], object]:
        a = torch.randn(side, side, device=device).to(dtype)
        b = torch.randn(side, side, device=device).to(dtype)
        out = torch.empty(side, side, device=device, dtype=dtype)
        return lambda: torch.mm(a, b, out=out)

    source = torch.zeros(COPY_BYTES[kind], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def wait() -> None:
        if kind == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        # A processor without units for a precision may take minutes for the full size.
        side = SMALLEST_SIDE
        product = _fastest(multiply(side), wait, 0.1)
        while side < MATMUL_SIDE[kind] and 8 * product < LONGEST_PRODUCT_SECONDS:
            side *= 2
            product = _fastest(multiply(side), wait, 0.5)
        copy = _fastest(lambda: target.copy_(source), wait)
    return {"flops": 2 * side**3 / product, "bytes": 2 * COPY_BYTES[kind] / copy}


def _fastest(work: Callable[[], object], wait: Callable[[], None], seconds: float = 0.5) -> float:
    """Repeat for a while, three times at least; the fastest run is the ceiling."""
    best, end, count = float("inf"), time.perf_counter() + seconds, 0
    while count < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - start)
        count += 1
    return best
