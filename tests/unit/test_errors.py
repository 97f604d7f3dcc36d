import inspect
import pickle
import re

import pytest

from coprs_deploy import errors
from coprs_deploy.errors import CoPRSError

CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if value.__module__ == errors.__name__
]


def drawn_tree():
    parents, branch = {}, []
    for line in errors.__doc__.splitlines():
        found = re.match(r"^    ([│ ]*)(?:[├└]── )?([A-Z]\w+)\b", line)
        if not found:
            continue
        depth = (len(found[1]) // 4) + 1 if "──" in line else 0
        branch[depth:] = [found[2]]
        parents[found[2]] = branch[depth - 1] if depth else None
    return parents


def test_the_drawn_tree_is_the_tree():
    assert drawn_tree() == {
        error.__name__: None if error is CoPRSError else error.__bases__[0].__name__
        for error in CLASSES
    }


@pytest.mark.parametrize("error", CLASSES)
def test_the_root_catches_every_error(error):
    with pytest.raises(CoPRSError, match="what happened"):
        raise error("what happened")


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_says_what_it_means(error):
    assert inspect.getdoc(error).endswith(".")
    assert error.__dict__.get("__doc__")


def test_errors_whose_cause_is_an_argument_are_value_errors():
    assert {error.__name__ for error in CLASSES if issubclass(error, ValueError)} == {
        "ImageError",
        "ImageDecodeError",
        "ImageSizeError",
        "InstructionError",
    }


def test_a_missing_package_is_an_import_error():
    assert {error.__name__ for error in CLASSES if issubclass(error, ImportError)} == {
        "MissingDependencyError"
    }


def test_only_failed_checks_end_with_exit_code_1():
    assert {error.__name__ for error in CLASSES if error.exit_code == 1} == {
        "BundleIntegrityError",
        "EquivalenceError",
    }
    assert {error.exit_code for error in CLASSES} == {1, 2}


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_can_cross_a_process_boundary(error):
    copy = pickle.loads(pickle.dumps(error("what happened")))
    assert type(copy) is error
    assert str(copy) == "what happened"
