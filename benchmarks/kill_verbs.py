"""Kill verbs at random moments, and check what they leave.

    python benchmarks/kill_verbs.py --repeat 20

Each verb runs on the demo model in a folder of its own, beside files of a user, in a process that
is forked from one with all libraries imported, so that the moments fall into the work. A run is
interrupted at a random moment; then the files of the user must be unchanged, no process may be
left, and the same command must succeed and leave the same files as a run that was never
interrupted, nothing else. A training, in one and in two processes, must resume from the newest
state that was there, and log the same losses. Prints a table and one line of JSON; exit code 1 on a
violation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil

from coprs_deploy import demo
from coprs_deploy.console import table
from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.synthetic import PLAIN, SceneExamples

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)

EVENTS = re.compile(r"events\.out\.tfevents\..*")
"""Name of TensorBoard's files: each run of a training adds one."""

CHECKPOINTS = re.compile(r"out/checkpoints/\w+-\d+(/.*)?")
"""Checkpoints of single steps: a stop by a signal writes a state only."""

MARK = "COPRS_KILL_VERBS"
"""Environment variable by which the processes of one run are found."""

FORK_SERVER = multiprocessing.get_context("forkserver")

PRELOADED = (
    *("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "trl", "matplotlib.pyplot"),
    *(f"coprs_deploy.cli.{verb}" for verb in ("convert", "export", "features", "train", "bench")),
    *("coprs_deploy.training.runs.run", "coprs_deploy.training.grpo.stage", "coprs_deploy.export"),
    *("coprs_deploy.runtime", "coprs_deploy.policy.transformers_policy"),
)
"""Modules that the process imports from which runs are forked; unknown ones are ignored."""

RUN_VERB = """
import atexit, faulthandler, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and one under nohup this
os.setsid()
os.chdir(folder)
os.environ.update(environment)
for stream, path in ((1, os.devnull), (2, stderr)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
faulthandler.register(signal.SIGUSR1, file=2)
try:
    from coprs_deploy.cli.main import main
    code = main(arguments)
except KeyboardInterrupt:
    code = 130  # while the program starts, as a shell shows it
finally:
    atexit._run_exitfuncs()
sys.exit(code)
"""
"""What a forked process runs; the names that it uses are its arguments."""

TIMEOUT_S = 300.0
EXIT_TIMEOUT_S = 60.0
STACK_SECONDS, STACK_LINES = 5.0, 60

SHORT_TRAINING = {
    "max_steps": 3,
    "global_batch_size": 1,
    "num_generations": 2,
    "num_eval_examples": 1,
    "max_completion_length": 24,
}

TRAIN = (
    *("train", "grpo_demo", "--out", "out"),
    *("--set", "save_steps=1"),
    *("--set", "data.num_held_out_scenes=1"),
    *("--set", "data.num_training_scenes=8"),
    *(word for k, v in SHORT_TRAINING.items() for word in ("--set", f"stages.grpo.{k}={v}")),
)

VERBS: dict[str, Sequence[str]] = {
    "convert": ("convert", "--random", "--overwrite", "--out", "out"),
    "export": ("export", "user/checkpoint", "--overwrite", "--out", "out"),
    "features": ("features", "user/checkpoint", "user/scenes.jsonl", "--out", "out"),
    "train": TRAIN,
    "train-two": (*TRAIN, "--set", "num_processes=2"),
    "segment": ("segment", "user/scene.png", "the largest red circle", "--out", "out"),
    "bench": (
        *("bench", "--suite", "engines", "--min-time", "0.05", "--rounds", "1", "--out", "out"),
        *("--filter", "prior.*(onnxruntime|eager).* cpu fp32$"),
    ),
}
"""Command of each verb, run in a folder that has a folder ``user``."""

REPLACED = {"convert": demo.CHECKPOINT, "export": demo.BUNDLE}
"""What ``--overwrite`` replaces; after an interruption it is complete, old or new."""


@dataclass
class Outcome:
    """Runs of one verb that one signal interrupted.

    Attributes:
        interrupted: number of runs that the signal ended.
        finished: number of runs that ended before the signal.
        codes: exit codes of the interrupted runs, with their number.
        violations: what was wrong.
    """

    interrupted: int = 0
    finished: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


class Place:
    """Folder of one verb: files of a user, the output, and a folder for temporary files."""

    def __init__(self, folder: Path, verb: str) -> None:
        self.folder, self.verb, self.temporary = folder, verb, folder / "tmp"
        self.stderr = folder.with_suffix(".stderr")
        user = folder / "user"
        for path in (user, self.temporary):
            path.mkdir(parents=True)
        (user / "notes.txt").write_text("mine", encoding="utf-8")
        shutil.copytree(demo.CHECKPOINT, user / "checkpoint")
        shutil.copy(Path(__file__).parents[1] / "examples" / "scene.png", user)
        write_examples(user / "scenes.jsonl", SceneExamples(PLAIN, 8))
        self.user = self.hashes(user)
        self.reference: set[str] = set()
        self.reference_losses: list[tuple[int, float]] = []
        self.results: list[dict[str, str]] = []
        self.seconds = 0.0

    @staticmethod
    def hashes(folder: Path) -> dict[str, str]:
        """Return the hash of each file below a folder, without hidden ones."""
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        }

    def files(self) -> set[str]:
        """Return the paths of all files and folders; those of TensorBoard hold time and process."""
        paths = (str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))
        return {EVENTS.sub("events", path) for path in paths if not CHECKPOINTS.fullmatch(path)}

    def newest_state(self) -> str | None:
        """Return the name of the newest state of a training; None if its stage is finished."""
        if any((self.folder / "out").glob("stages/*/result.json")):
            return None
        states = (
            file.parent for file in (self.folder / "out").glob("stages/*/state-*/progress.json")
        )
        return max((state.name for state in states), default=None)

    def losses(self) -> list[tuple[int, float]]:
        """Return step and loss of each line of the log of a training."""
        log = self.folder / "out" / "log.jsonl"
        lines = map(json.loads, log.read_text().splitlines()) if log.is_file() else ()
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    def clear(self) -> None:
        """Start again: remove the output, or put there what will be replaced."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        if self.verb in REPLACED:
            shutil.copytree(REPLACED[self.verb], self.folder / "out")

    def start(self) -> ForkServerProcess:
        """Start the command of the verb."""
        settings = {
            "folder": str(self.folder),
            "environment": {MARK: str(self.folder), "TMPDIR": str(self.temporary)},
            "stderr": str(self.stderr),
            "arguments": list(VERBS[self.verb]),
        }
        process = FORK_SERVER.Process(target=exec, args=(RUN_VERB, settings))
        process.start()
        return process

    def last_lines(self, count: int = 1) -> str:
        """Return the last lines that the last run wrote to stderr."""
        return "\n".join(self.stderr.read_text(errors="replace").strip().splitlines()[-count:])

    def complete(self) -> int:
        """Run the command to its end; return its exit code."""
        return self.end_of(self.start())

    def end_of(self, process: ForkServerProcess) -> int:
        """Wait for the end of a run; return its exit code, negative for a signal.

        One that does not end is killed, after its threads wrote what they do.
        """
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            assert process.pid is not None, "it was started"
            os.kill(process.pid, signal.SIGUSR1)
            process.join(STACK_SECONDS)
            for each in self.processes():
                each.kill()
            process.join()
            lines = self.last_lines(STACK_LINES)
            print(f"{self.verb} did not end within {TIMEOUT_S:.0f} s:\n{lines}", file=sys.stderr)
        assert process.exitcode is not None, "it was joined"
        return process.exitcode

    def processes(self) -> list[psutil.Process]:
        """Return the processes of interrupted runs that still exist."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.folder):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def measure(self) -> None:
        """Run twice without an interruption: the shorter duration, and the files that it leaves."""
        durations = []
        for _ in range(2):  # the first one also fills the caches of the system
            self.clear()
            start = time.monotonic()
            code = self.complete()
            durations.append(time.monotonic() - start)
            if code:
                line = self.last_lines()
                raise RuntimeError(f"{self.verb} ends with {code} without a signal: {line}")
        self.seconds = min(durations)
        self.reference, self.reference_losses = self.files(), self.losses()
        if self.verb in REPLACED:
            out = self.folder / "out"
            self.results = [self.hashes(out), self.hashes(Path(REPLACED[self.verb]))]


def interrupt(place: Place, number: signal.Signals, after_s: float, outcome: Outcome) -> None:
    """Interrupt one run, check what it left, and run the command again."""
    place.clear()
    where = f"{place.verb} {number.name} after {after_s:.2f} s"
    process = place.start()
    process.join(after_s)
    assert process.pid is not None, "it was started"
    with suppress(ProcessLookupError):
        os.kill(process.pid, number)
    code = place.end_of(process)
    outcome.codes[code] += 1
    if code == 0:
        outcome.finished += 1
    else:
        outcome.interrupted += 1
    if code not in (0, -number, 128 + number):
        outcome.violations.append(f"{where}: exit code {code}: {place.last_lines()}")
    _check_processes(place, where, outcome)
    if place.hashes(place.folder / "user") != place.user:
        outcome.violations.append(f"{where}: files of the user changed")
    if place.results and place.hashes(place.folder / "out") not in place.results:
        outcome.violations.append(f"{where}: what was to be replaced is neither old nor new")
    state = place.newest_state()
    if code := place.complete():
        line = place.last_lines()
        outcome.violations.append(f"{where}: the next run ends with {code}: {line}")
    if state and f"resumed from step {int(state[6:])}\n" not in place.stderr.read_text():
        outcome.violations.append(f"{where}: the next run does not resume from {state}")
    if place.losses() != place.reference_losses:
        outcome.violations.append(f"{where}: other losses: {place.losses()}")
    if left := sorted(place.files() ^ place.reference):
        outcome.violations.append(f"{where}: after the next run: {left[:5]}")
        for name in left:
            _remove(place.folder / name)


def _check_processes(place: Place, where: str, outcome: Outcome) -> None:
    end = time.monotonic() + EXIT_TIMEOUT_S
    while (left := place.processes()) and time.monotonic() < end:
        time.sleep(0.2)
    for process in left:
        outcome.violations.append(f"{where}: process {process.pid} is left ({process.status()})")
        process.kill()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def run(verbs: Sequence[str], signals: Sequence[signal.Signals], repeat: int, seed: int) -> int:
    """Interrupt each verb by each signal; print table and JSON; return the exit code."""
    moments = random.Random(seed)
    outcomes: dict[tuple[str, str], Outcome] = {}
    FORK_SERVER.set_forkserver_preload(list(PRELOADED))
    imports = FORK_SERVER.Process(target=exec, args=("pass", {}))
    imports.start()
    imports.join()
    with tempfile.TemporaryDirectory(prefix="kill-verbs-") as folder:
        for verb in verbs:
            place = Place(Path(folder) / verb, verb)
            place.measure()
            print(f"{verb}: {place.seconds:.1f} s without a signal", file=sys.stderr, flush=True)
            for number in signals:
                outcome = outcomes[verb, number.name] = Outcome()
                for _ in range(repeat):
                    interrupt(place, number, moments.uniform(0, place.seconds), outcome)
                counts = f"{outcome.interrupted} interrupted, {outcome.finished} finished"
                for line in (f"{verb} {number.name}: {counts}", *outcome.violations):
                    print(line, file=sys.stderr, flush=True)
    rows = [
        (
            f"{verb} {number}",
            str(each.interrupted),
            str(each.finished),
            ", ".join(f"{code}: {count}" for code, count in sorted(each.codes.items())),
            str(len(each.violations)),
        )
        for (verb, number), each in outcomes.items()
    ]
    print(table(("", "interrupted", "finished", "exit codes", "violations"), rows))
    violations = [text for each in outcomes.values() for text in each.violations]
    runs = sum(each.interrupted + each.finished for each in outcomes.values())
    print(json.dumps({"runs": runs, "seed": seed, "violations": violations}))
    return 1 if violations else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and run."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [number.name for number in SIGNALS]
    parser.add_argument("--repeat", type=int, default=20, help="runs of each verb and signal")
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=list(VERBS))
    parser.add_argument("--signals", nargs="+", choices=names, default=names)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parsed = parser.parse_args(arguments)
    signals = [signal.Signals[name] for name in parsed.signals]
    return run(parsed.verbs, signals, parsed.repeat, parsed.seed)


if __name__ == "__main__":
    sys.exit(main())
