"""Rehearse the paper's path at small scale: from a data set to a server, with a kill in each part.

    python training/rehearsal.py --work-dir DIR [--report training/reports/rehearsal]

Synthetic scenes in RefCOCO's layout take the place of the data, the parts of the demo model that of
the public weights: its policy, and its SAM without the prior that was trained for it. The path is
walked twice by the same commands, training and evaluation in two processes. The second time, each
part is ended by SIGKILL in the middle of its work, and its command is run again. No process may be
left, and what each part writes must be equal to that of the first time: files by their bytes, logs
and responses without their times. Exit code 1 if something differs.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from coprs_deploy import demo
from coprs_deploy.artifacts import write_json, write_text
from coprs_deploy.console import markdown_table
from coprs_deploy.data.examples import Example
from coprs_deploy.data.readers.registry import SourceOptions, open_source
from coprs_deploy.data.rle import decode_mask
from coprs_deploy.machine import machine_record
from coprs_deploy.training.runs.run_directory import read_report
from coprs_deploy.visualization import draw_grid, draw_overlay

REPORTS = Path(__file__).parent / "reports" / "rehearsal"

EXIT_TIMEOUT_S, START_TIMEOUT_S = 600.0, 600.0

VOLATILE = ("seconds", "step_time", "peak_memory_gb", "timings", "runtime")
"""Keys of logs and responses that hold times, memory, or what the machine is."""

BOUNDARY = "rehearsal-boundary"

TILE_PX = 240

MAX_SIDE_PX = 1200
"""Longer side of an image of the report."""

SUPERVISED = """
base = "supervised_7b"
description = "rehearsal: supervised start on scenes with reasoning"
precision = "fp32"
save_dtype = "bfloat16"
num_processes = 2
num_threads = 1
num_workers = 0
logging_steps = 1
save_steps = {supervised_interval}

[model]
path = "checkpoint"

[data]
training = "start.jsonl"
held_out = "start_held_out.jsonl"
features = "features"

[stages.supervised]
max_steps = {supervised_steps}
global_batch_size = {supervised_batch}
eval_steps = {supervised_interval}
num_eval_examples = {num_held_out}
num_completions_to_print = 4

[stages.supervised.optimizer]
learning_rate = 1e-3
lr_multipliers = {{ prior = 3.0, prompt_encoder = 2.0, mask_decoder = 1.0 }}
"""

GRPO = """
base = "grpo_7b"
description = "rehearsal: GRPO and segmentation in one backward pass"
precision = "fp32"
save_dtype = "bfloat16"
num_processes = 2
num_threads = 1
save_steps = {grpo_interval}

[model]
path = "runs/start/checkpoint"

[data]
training = "train.parquet"
held_out = "held_out.parquet"
features = "features"

[stages.grpo]
max_steps = {grpo_steps}
global_batch_size = {num_prompts}
num_generations = 8
per_device_train_batch_size = 0
max_completion_length = 96
late_from_step = {late_from_step}
eval_steps = {grpo_interval}
num_eval_examples = {num_held_out}
num_completions_to_print = 4

[stages.grpo.optimizer]
learning_rate = 1e-4
lr_multipliers = {{ prior = 5.0, prompt_encoder = 2.0, mask_decoder = 1.0 }}
"""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a rehearsal; examples are scenes of the preset ``plain``.

    An interval is the number of steps between evaluations, and between states.
    """

    num_training: int = 64
    num_excluded: int = 8
    num_start: int = 160
    num_held_out: int = 24
    supervised_steps: int = 24
    supervised_batch: int = 8
    supervised_interval: int = 8
    grpo_steps: int = 6
    num_prompts: int = 2
    late_from_step: int = 3
    grpo_interval: int = 2


@dataclass(frozen=True)
class Step:
    """One command of the path.

    Attributes:
        part: part that it belongs to.
        command: arguments of ``coprs-deploy``.
        outputs: files and folders that are compared.
        moment: pattern of files; the command is killed when ``count`` of them are there. Empty for
            commands that are not killed.
        count: number of files.
    """

    part: str
    command: str
    outputs: tuple[str, ...] = ()
    moment: str = ""
    count: int = 1

    @property
    def arguments(self) -> list[str]:
        """The arguments as a list."""
        return self.command.split()


@dataclass
class Outcome:
    """What became of a step.

    Attributes:
        seconds: seconds of the command; with a kill, of the second one.
        killed_after: seconds until the kill; None without one.
        content: hash of each file that it wrote.
        violations: what was wrong.
    """

    step: Step
    seconds: float = 0.0
    killed_after: float | None = None
    content: dict[str, str] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)


def path_steps(sizes: Sizes) -> list[Step]:
    """Return the commands of the path, in their order, but the server."""
    scenes = "synth --preset plain --num-examples"
    state = "runs/{}/stages/{}/state-*/progress.json"
    held_out = f"--held-out --num-examples {sizes.num_held_out}"
    start = sizes.num_training
    return [
        Step(
            "data set",
            f"{scenes} {sizes.num_training} --layout refer --out data",
            ("data",),
            ".data.partial-*/**/*.jpg",
            4,
        ),
        Step(
            "data set", f"synth {held_out} --layout refer --out data_held_out", ("data_held_out",)
        ),
        Step(
            "data set",
            f"{scenes} {sizes.num_excluded} --layout refer --out data_other",
            ("data_other",),
        ),
        Step(
            "data set",
            f"{scenes} {sizes.num_start} --first-seed {start} --out start.jsonl",
            ("start.jsonl",),
        ),
        Step(
            "data set",
            f"synth {held_out} --first-seed {sizes.num_held_out} --out start_held_out.jsonl",
            ("start_held_out.jsonl",),
        ),
        Step("examples", "data inspect refcoco:train --root data --out sheet.png", ("sheet.png",)),
        Step(
            "examples",
            "data convert refcoco:train --root data_other --out other.jsonl",
            ("other.jsonl",),
        ),
        Step(
            "examples",
            "data convert refcoco:train --root data --out train.parquet "
            "--exclude-images-of other.jsonl",
            ("train.parquet",),
            ".train.parquet.new-*",
        ),
        Step(
            "examples",
            "data convert refcoco:val --root data_held_out --out held_out.parquet",
            ("held_out.parquet",),
        ),
        Step(
            "checkpoint",
            "convert --policy policy --sam sam_vit_small.pth --out checkpoint",
            ("checkpoint",),
            ".checkpoint.partial-*/new/*",
        ),
        Step(
            "features",
            "features checkpoint train.parquet held_out.parquet start.jsonl start_held_out.jsonl "
            "--images-per-shard 16 --out features",
            ("features",),
            "features/shard-*.safetensors",
            2,
        ),
        Step("supervised start", "train supervised.toml --check --out runs/start"),
        Step(
            "supervised start",
            "train supervised.toml --out runs/start",
            ("runs/start/checkpoint", "runs/start/log.jsonl", "runs/start/gallery"),
            state.format("start", "supervised"),
        ),
        Step("GRPO", "train grpo.toml --check --out runs/grpo"),
        Step(
            "GRPO",
            "train grpo.toml --out runs/grpo",
            ("runs/grpo/checkpoint", "runs/grpo/log.jsonl", "runs/grpo/gallery"),
            state.format("grpo", "grpo"),
        ),
        Step("export", "export runs/grpo/checkpoint --out bundle", ("bundle",), ".bundle.*-*/*"),
        Step(
            "evaluation",
            "evaluate bundle --dataset refcoco:val --root data_held_out --protocol lisa "
            "--workers 2 --out metrics",
            ("metrics/evaluation.json", "metrics/refcoco-val/rows.jsonl"),
            "metrics/*/rows.partial.jsonl",
        ),
    ]


IMAGES = {
    "sheet.jpg": "sheet.png",
    "start.png": "runs/start/plots/supervised.png",
    "grpo.png": "runs/grpo/plots/grpo.png",
    "gallery.png": "runs/grpo/gallery/grpo/00.png",
}
"""Images of the report, and the files that they are copies of."""

CAPTIONS = {
    "sheet.jpg": "The data set, targets outlined.",
    "start.png": "Curves of the supervised start.",
    "grpo.png": "Curves of GRPO.",
    "gallery.png": "A held-out example after GRPO: image, ground truth, prior, mask.",
    "served.png": "The response of the server: image, ground truth, mask.",
}

SERVER = Step("server", "serve bundle --port 0", ("served.json",), "request")


def write_sources(folder: Path, sizes: Sizes) -> None:
    """Write what a user has at the start: a policy, SAM's weights, and the recipes."""
    shutil.copytree(demo.CHECKPOINT / "policy", folder / "policy")
    tensors = load_file(demo.CHECKPOINT / "segmentation.safetensors")
    sam = {name: tensor for name, tensor in tensors.items() if not name.startswith("prior.")}
    torch.save(sam, folder / "sam_vit_small.pth")
    for name, text in (("supervised", SUPERVISED), ("grpo", GRPO)):
        write_text(folder / f"{name}.toml", text.format(**vars(sizes)))


class Walk:
    """One walk along the path in a folder; with ``kills``, each part is killed once."""

    def __init__(self, folder: Path, kills: bool) -> None:
        self.folder, self.kills = folder, kills
        self._log = folder.with_suffix(".log")

    def run(self, step: Step) -> Outcome:
        """Run a command to its end, after a kill in the middle of its work if it has a moment."""
        outcome = Outcome(step)
        if self.kills and step.moment:
            self._kill(step, outcome)
        started = time.monotonic()
        code = self._start(step).wait()
        outcome.seconds = time.monotonic() - started
        if code:
            raise RuntimeError(f"`{step.command}` ends with {code}; see {self._log}")
        for output in step.outputs:
            outcome.content |= hashes(self.folder, self.folder / output)
        return outcome

    def serve(self, example: Example) -> Outcome:
        """Ask the server, after a kill during a request."""
        outcome, started = Outcome(SERVER), time.monotonic()
        if self.kills:
            with self._serving() as (server, address), closing(_send(address, example)):
                server.kill()
                server.wait()
                outcome.killed_after = time.monotonic() - started
        started = time.monotonic()
        with self._serving() as (_, address):
            write_json(self.folder / "served.json", _ask(address, example))
        outcome.seconds = time.monotonic() - started
        outcome.content = hashes(self.folder, self.folder / "served.json")
        return outcome

    def _start(self, step: Step) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self._log.open("ab") as log:
            log.write(f"$ coprs-deploy {step.command}\n".encode())
            log.flush()
            command = [sys.executable, "-m", "coprs_deploy", *step.arguments]
            return subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log
            )

    def _kill(self, step: Step, outcome: Outcome) -> None:
        """Kill a command at its moment, and wait for the processes that it started."""
        started, process = time.monotonic(), self._start(step)
        while process.poll() is None and not self._has_come(step):
            time.sleep(0.001)
        if process.poll() is not None:
            outcome.violations.append(f"`{step.command}` ended before it could be killed")
            return
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        outcome.killed_after = time.monotonic() - started
        _, left = psutil.wait_procs(children, EXIT_TIMEOUT_S)
        for each in left:
            outcome.violations.append(f"`{step.command}`: process {each.pid} is left")
            each.kill()

    def _has_come(self, step: Step) -> bool:
        found = (path for path in self.folder.glob(step.moment) if _size(path))
        return sum(1 for _ in found) >= step.count

    @contextmanager
    def _serving(self) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
        """Start the server; yield it and its address, and stop it."""
        before = self._log.stat().st_size
        server = self._start(SERVER)
        try:
            end = time.monotonic() + START_TIMEOUT_S
            while server.poll() is None and time.monotonic() < end:
                text = self._log.read_bytes()[before:].decode(errors="replace")
                if found := re.search(r"^http://(127\.0\.0\.1:\d+)$", text, re.MULTILINE):
                    break
                time.sleep(0.1)
            else:
                raise RuntimeError(f"the server does not listen; see {self._log}")
            yield server, found[1]
        finally:
            server.terminate()
            server.wait()


def _size(path: Path) -> int:
    """Return the size of a file that may vanish meanwhile."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _send(address: str, example: Example) -> http.client.HTTPConnection:
    """Send a request to the server; its response has not been read."""
    file = io.BytesIO()
    Image.fromarray(example.image).save(file, "PNG")
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="'
    text = f'{head}instruction"\r\n\r\n{example.instruction}\r\n'
    image = f'{head}image"; filename="image.png"\r\n\r\n'
    body = f"{text}{image}".encode() + file.getvalue() + f"\r\n--{BOUNDARY}--\r\n".encode()
    connection = http.client.HTTPConnection(address, timeout=START_TIMEOUT_S)
    form = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    connection.request("POST", "/segment", body, form)
    return connection


def _ask(address: str, example: Example) -> dict[str, Any]:
    """Send a request; return the result."""
    with closing(_send(address, example)) as connection:
        response = connection.getresponse()
        body = response.read()
    if response.status != http.client.OK:
        raise RuntimeError(f"the server answers with {response.status}: {body[:200]!r}")
    result: dict[str, Any] = json.loads(body)
    return result


def hashes(root: Path, path: Path) -> dict[str, str]:
    """Return the hash of a file, or of each file below a folder; hidden ones are left out."""
    found = {}
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        name = file.relative_to(root)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            found[str(name)] = hashlib.sha256(_content(file)).hexdigest()
    return found


def _content(file: Path) -> bytes:
    """Return the bytes of a file; of logs and responses, those without ``VOLATILE``.

    The header of safetensors is sorted: the library writes metadata in no fixed order.
    """
    if file.suffix == ".safetensors":
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        return json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]
    if file.name not in ("log.jsonl", "served.json"):
        return file.read_bytes()
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    kept = [
        {key: value for key, value in json.loads(line).items() if key not in VOLATILE}
        for line in lines
    ]
    return json.dumps(kept).encode()


def compare(whole: Sequence[Outcome], killed: Sequence[Outcome]) -> None:
    """Add a violation to each step of the second walk that wrote something else than the first."""
    for expected, found in zip(whole, killed, strict=True):
        keys = sorted(expected.content.keys() | found.content.keys())
        if other := [k for k in keys if expected.content.get(k) != found.content.get(k)]:
            found.violations.append(
                f"`{found.step.command}` writes something else after a kill: {', '.join(other[:5])}"
            )
        if found.step.outputs and not found.content:
            found.violations.append(f"`{found.step.command}` wrote nothing to compare")


def leftovers(whole: Path, killed: Path) -> list[str]:
    """Return the hidden files that only the second walk left."""
    first, second = (
        {str(path.relative_to(folder)) for path in folder.rglob(".*")} for folder in (whole, killed)
    )
    return sorted(second - first)


def walk(
    folder: Path, kills: bool, sizes: Sizes, progress: Callable[[str], None] = print
) -> list[Outcome]:
    """Walk along the path in a new folder."""
    folder.mkdir(parents=True)
    write_sources(folder, sizes)
    found, way = [], Walk(folder, kills)
    for step in path_steps(sizes):
        found.append(way.run(step))
        progress(_progress_text(found[-1]))
    found.append(way.serve(_served_example(folder)))
    progress(_progress_text(found[-1]))
    return found


def _progress_text(outcome: Outcome) -> str:
    after = outcome.killed_after
    kill = f"killed after {after:.1f} s, " if after is not None else ""
    return f"{outcome.step.part}: `{outcome.step.command}`: {kill}{outcome.seconds:.1f} s"


def _served_example(folder: Path) -> Example:
    """Return the first held-out example that has a target."""
    source = open_source("refcoco:val", SourceOptions(folder / "data_held_out"))
    return next(example for example in source if len(example.masks))


def metrics_of(folder: Path) -> list[tuple[str, str]]:
    """Return what the path reached, as rows of a table."""
    start, grpo = (read_report(folder / "runs" / name)["stages"] for name in ("start", "grpo"))
    (evaluated,) = json.loads((folder / "metrics" / "evaluation.json").read_text("utf-8"))[
        "datasets"
    ].values()
    stage = grpo["grpo"]
    return [
        (
            "gIoU of given responses after the supervised start",
            f"{start['supervised']['metrics']['teacher_forced_giou']:.3f}",
        ),
        ("gIoU of greedy responses before GRPO", f"{stage['init_metrics']['before/giou']:.3f}"),
        ("gIoU after GRPO", f"{stage['metrics']['giou']:.3f}"),
        ("reward before GRPO", f"{stage['init_metrics']['before/reward']:.3f}"),
        ("reward after GRPO", f"{stage['metrics']['reward']:.3f}"),
        *(
            (f"{label} of the bundle, protocol lisa", f"{evaluated['metrics'][name]['value']:.3f}")
            for label, name in (("gIoU", "giou"), ("cIoU", "ciou"))
        ),
    ]


def write_report(out: Path, folder: Path, killed: Sequence[Outcome], minutes: float) -> None:
    """Write table, metrics and images of a rehearsal; ``folder`` is that of the second walk."""
    out.mkdir(parents=True, exist_ok=True)
    for name, file in IMAGES.items():
        with Image.open(folder / file) as image:
            drawn = image.convert("RGB")
        drawn.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
        drawn.save(out / name, optimize=True, quality=85)
    draw_served(folder).save(out / "served.png", optimize=True)
    metrics = metrics_of(folder)
    rows = [
        (
            each.step.part,
            f"`{each.step.command}`",
            "" if each.killed_after is None else f"{each.killed_after:.1f}",
            f"{each.seconds:.1f}",
            "; ".join(each.violations) or ("equal" if each.content else ""),
        )
        for each in killed
    ]
    machine = machine_record()
    lines = [
        "# Rehearsal of the paper's path",
        "",
        "Written by `python training/rehearsal.py`. Each command of the path was run twice: alone, "
        "and killed by SIGKILL in the middle of its work and run again; the table is of the second "
        "time. `equal`: what it wrote is what it wrote without a kill, but for times. Training and "
        "evaluation run in two processes.",
        "",
        f"{minutes:.1f} minutes for both on {machine.cores} cores of {machine.processor}; load at "
        f"the end, as the mean of 15 minutes: {os.getloadavg()[2]:.1f}.",
        "",
        *markdown_table(("part", "command", "killed after, s", "then, s", "result"), rows),
        "",
        "## What it reached",
        "",
        *markdown_table(("", "value"), metrics),
        "",
        *(f"![{text}]({name})\n\n{text}\n" for name, text in CAPTIONS.items()),
    ]
    write_text(out / "report.md", "\n".join(lines).rstrip() + "\n")
    record = {"machine": machine.to_json(), "minutes": minutes, "metrics": dict(metrics)}
    record["steps"] = [
        {
            "part": each.step.part,
            "command": each.step.command,
            "killed_after_s": each.killed_after,
            "seconds": each.seconds,
            "files": len(each.content),
            "violations": each.violations,
        }
        for each in killed
    ]
    write_json(out / "report.json", record)


def draw_served(folder: Path) -> Image.Image:
    """Draw the served example: image, ground truth, and the mask of the response."""
    example = _served_example(folder)
    height, width = example.image.shape[:2]
    served = json.loads((folder / "served.json").read_text("utf-8"))["masks"]
    masks = [decode_mask(each, height, width) for each in served]
    drawn: list[NDArray[np.bool_]] = [example.masks[:0], example.masks]
    drawn.append(np.stack(masks) if masks else example.masks[:0])
    return draw_grid([[draw_overlay(example.image, each) for each in drawn]], TILE_PX)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, walk twice, compare, and write the report."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True, help="new folder for both walks")
    parser.add_argument("--report", type=Path, default=REPORTS, help="folder of the report")
    parsed = parser.parse_args(arguments)
    return rehearse(parsed.work_dir, parsed.report, Sizes())


def rehearse(work_dir: Path, report: Path, sizes: Sizes) -> int:
    """Walk along the path twice; return the exit code."""
    started = time.monotonic()
    folders = [work_dir.absolute() / name for name in ("whole", "killed")]
    whole, killed = (walk(folder, folder.name == "killed", sizes) for folder in folders)
    compare(whole, killed)
    if left := leftovers(*folders):
        killed[-1].violations.append(f"left after the kills: {', '.join(left[:5])}")
    minutes = (time.monotonic() - started) / 60
    write_report(report, folders[1], killed, minutes)
    violations = [text for each in killed for text in each.violations]
    print(json.dumps({"minutes": round(minutes, 1), "violations": violations}))
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
