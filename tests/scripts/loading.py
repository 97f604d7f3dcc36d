"""Load the scripts of the root folders by path, as the command line runs them."""

import importlib.util
import sys

from tests import ROOT


def load_script(path):
    """Return the module of a script such as ``export/compile_engines.py``."""
    name = f"script_{path.replace('/', '_').removesuffix('.py')}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
