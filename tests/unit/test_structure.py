"""The shape of the project: names in strings resolve, root folders hold scripts and no packages."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = ROOT / "coprs_deploy"
ROOT_FOLDERS = ("benchmarks", "engines", "export", "training")
SCRIPTS = sorted(path for folder in ROOT_FOLDERS for path in (ROOT / folder).glob("*.py"))

MODULE_IN_TEXT = re.compile(r"^coprs_deploy(?:\.\w+)+(?::\w+)?$")


def module_strings():
    """Collect the string literals that name a module, or a function in one, with their files."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and MODULE_IN_TEXT.match(text):
                found.add((text, str(path.relative_to(ROOT))))
    return sorted(found)


def has_module(name: str) -> bool:
    """Whether a dotted name is a module, or a name in a module; nothing outside is imported."""
    try:
        if importlib.util.find_spec(name) is not None:
            return True
    except ModuleNotFoundError:
        pass
    parent, _, attribute = name.rpartition(".")
    source = Path(importlib.util.find_spec(parent).origin).read_text(encoding="utf-8")
    return re.search(rf"^(?:(?:class|def) )?{attribute}\b", source, re.MULTILINE) is not None


@pytest.mark.parametrize(("name", "file"), module_strings())
def test_module_name_in_a_string_resolves(name, file):
    module, _, function = name.partition(":")
    assert has_module(module), f"{file} names {module}"
    if function:
        source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
        assert re.search(rf"^(?:class|def) {function}\b", source, re.MULTILINE), (
            f"{file} names {name}"
        )


def test_root_folder_has_a_readme_and_is_no_package():
    for folder in ROOT_FOLDERS:
        assert (ROOT / folder / "README.md").is_file(), folder
        assert not (ROOT / folder).is_symlink(), folder
        assert not list((ROOT / folder).rglob("__init__.py")), folder


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_root_script_hides_no_module(script):
    taken = sys.stdlib_module_names | packages_distributions().keys()
    assert script.stem not in taken


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_root_script_has_a_main_function(script):
    functions = {
        node.name: node
        for node in ast.parse(script.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert [a.arg for a in functions["main"].args.args] == ["arguments"]


def test_verb_has_a_module_with_a_description_and_arguments():
    from coprs_deploy.cli.main import VERBS

    for verb in VERBS:
        module = importlib.import_module(f"coprs_deploy.cli.{verb}")
        assert module.__doc__
        assert callable(module.add_arguments)
        assert callable(module.run)
