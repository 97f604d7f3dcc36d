"""A small report for tests."""

import msgspec

from coprs_deploy.bench.report import (
    Accuracy,
    CaseResult,
    GroupResult,
    Memory,
    Report,
    Skipped,
    ratio_of_rounds,
    summarize_runs,
)
from coprs_deploy.machine import Machine


def case(name, rounds, iou=1.0, memory=100_000_000, **labels):
    return CaseResult(
        name=name,
        labels={"device": "cpu", **labels},
        latency=summarize_runs(rounds),
        stages={"prefill": 1.0, "decode": 2.0},
        memory=Memory(host=memory),
        accuracy=Accuracy(
            inputs=4, embedding_cosine=0.9999, mask_relative_error=1 - iou, mask_iou_mean=iou
        ),
        ratio=ratio_of_rounds("base", [2.0, 2.1], [1.0, 1.0]),
    )


def report(*cases, tag="demo", date="2026-11-25", **changes):
    cases = cases or (case("graph <1> | fast", [[9.0, 10.0, 11.0], [10.0, 10.5]]),)
    group = GroupResult("engines", "tiny: image_encoder", "one image", tuple(cases), "interleaved")
    made = Report(
        schema_version=1,
        tag=tag,
        date=date,
        command="coprs-deploy bench",
        model="demo",
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
        groups=(group,),
        skipped=(Skipped("tensorrt", "not installed", "pip install tensorrt", "engines"),),
    )
    return msgspec.structs.replace(made, **changes)
