"""Tests of the scripts in the root folders, loaded by path."""

import importlib.util
import sys
from types import ModuleType

from tests import ROOT


def load_script(path: str) -> ModuleType:
    """Load a script by its path below the checkout, without running its ``main``."""
    name = f"script_{path.removesuffix('.py').replace('/', '_')}"
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # records resolve their annotations there
    spec.loader.exec_module(module)
    return module
