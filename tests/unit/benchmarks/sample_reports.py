"""A small report for tests."""

import msgspec

from coprs_deploy.benchmarks.report import (
    Accuracy,
    Ceilings,
    GroupResult,
    LeftOut,
    Machine,
    Memory,
    Report,
    Row,
    Work,
)
from coprs_deploy.benchmarks.statistics import ratio_of_rounds, summarize_runs


def row(name, rounds, iou=1.0, memory=100_000_000, **labels):
    return Row(
        name=name,
        labels={"device": "cpu", **labels},
        latency=summarize_runs(rounds),
        stages={"prefill": 1.0, "decode": 2.0},
        memory=Memory(host=memory),
        accuracy=Accuracy(inputs=4, embedding_cosine=0.9999, mask_error=1 - iou, mask_iou=iou),
        work=Work(1e9, 1e6, "compute", 1.0, 0.5, "fp32"),
        ratio=ratio_of_rounds("base", [2.0, 2.1], [1.0, 1.0]),
    )


def report(*rows, theme="shipped", date="2026-11-25", **changes):
    rows = rows or (row("graph <1> | fast", [[9.0, 10.0, 11.0], [10.0, 10.5]]),)
    group = GroupResult("engines", "tiny: image_encoder", "one image", tuple(rows), "in turns")
    made = Report(
        schema_version=1,
        theme=theme,
        date=date,
        command="coprs-deploy bench",
        model="shipped",
        machine=Machine(
            kind="cpu-2-cores-avx2",
            processor="a processor",
            vector_units=("avx2",),
            cores=2,
            memory_bytes=8 << 30,
            gpu=None,
            driver=None,
            system="Linux",
            versions={"torch": "2.0"},
            commit="0123abcd",
        ),
        ceilings=(Ceilings("cpu", {"fp32": 1e11}, 1e10),),
        groups=(group,),
        left_out=(LeftOut("engines", "tensorrt", "not installed", "pip install tensorrt"),),
    )
    return msgspec.structs.replace(made, **changes)
