"""The public names of the package, and what importing it loads."""

import ast
import importlib
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import coprs_deploy
from coprs_deploy.errors import CoPRSError

PUBLIC_NAMES = [
    "CoPRS",
    "CoPRSError",
    "ImageError",
    "InstructionError",
    "PolicyError",
    "PriorEvent",
    "QueueFullError",
    "RequestTimeoutError",
    "RuntimeOptions",
    "SegmentationResult",
    "TextDelta",
    "Timings",
    "__version__",
]

ANY_LIBRARY = [
    "PIL",
    "accelerate",
    "fastapi",
    "huggingface_hub",
    "matplotlib",
    "msgspec",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "pycocotools",
    "safetensors",
    "supervision",
    "tensorrt",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
    "vllm",
]
HEAVY_LIBRARIES = sorted(set(ANY_LIBRARY) - {"PIL", "msgspec", "numpy"})


def roots_loaded_by(statement):
    program = (
        f"import json, sys\n{statement}\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stderr == ""
    return set(json.loads(run.stdout))


@pytest.mark.parametrize(
    "statement",
    [
        "import coprs_deploy",
        "from coprs_deploy import CoPRSError, __version__",
        "import coprs_deploy; dir(coprs_deploy); coprs_deploy.__version__",
    ],
)
def test_import_package_loads_no_library(statement):
    loaded = roots_loaded_by(statement)
    assert "coprs_deploy" in loaded
    assert loaded.isdisjoint(ANY_LIBRARY)


def test_import_runtime_loads_no_heavy_library():
    loaded = roots_loaded_by("from coprs_deploy import CoPRS, PriorEvent, SegmentationResult")
    assert "numpy" in loaded
    assert loaded.isdisjoint(HEAVY_LIBRARIES)


def test_public_names_are_exactly_these():
    assert coprs_deploy.__all__ == PUBLIC_NAMES
    assert dir(coprs_deploy) == sorted(PUBLIC_NAMES)


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name_resolves_to_the_object_of_that_name(name):
    value = getattr(coprs_deploy, name)
    assert value is getattr(coprs_deploy, name)
    if isinstance(value, type):
        assert value.__name__ == name
        assert value.__module__.startswith("coprs_deploy.")


def test_star_import_has_every_public_name():
    namespace = {}
    exec("from coprs_deploy import *", namespace)
    assert set(PUBLIC_NAMES) <= set(namespace)
    assert namespace["CoPRSError"] is CoPRSError


def test_type_checking_imports_equal_the_lazy_names():
    tree = ast.parse(Path(coprs_deploy.__file__).read_text(encoding="utf-8"))
    guarded = [
        node
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
    ]
    seen = {alias.name: node.module for node in guarded for alias in node.names}
    assert {*seen, "__version__"} == set(PUBLIC_NAMES)
    for name, module in seen.items():
        assert getattr(coprs_deploy, name) is getattr(importlib.import_module(module), name)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'coprs_deploy' has no attribute 'Coprs'"):
        _ = coprs_deploy.Coprs
    with pytest.raises(ImportError, match="Coprs"):
        exec("from coprs_deploy import Coprs")


def test_version_is_that_of_the_distribution():
    assert coprs_deploy.__version__ == version("coprs-deploy")


def test_python_m_coprs_deploy_runs_the_command_line():
    command = [sys.executable, "-m", "coprs_deploy", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == f"coprs-deploy {coprs_deploy.__version__}\n"


def test_libraries_report_nothing_to_their_makers():
    pytest.importorskip("openvino")
    code = (
        "import coprs_deploy, os, openvino.tools.ovc as ovc; "
        "print(os.environ['ORT_DISABLE_TELEMETRY'], type(ovc.telemetry).__module__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1", "openvino.tools.ovc.telemetry_stub"]
