"""The parser of the command line: lazily built verbs, suggestions, errors as JSON."""

import argparse
import json

import pytest

from coprs_deploy.cli.main import VERBS, build_parser
from coprs_deploy.cli.parser import SuggestingParser, log, print_json, print_result


@pytest.fixture
def verbs():
    """A parser of two verbs, and the list of those that were built."""
    built = []

    def fill(name, flag):
        def add(parser):
            built.append(name)
            parser.add_argument("--preset", choices=("plain", "full"))
            parser.add_argument(flag, action="store_true")
            parser.add_argument("--json", action="store_true")

        return add

    parser = SuggestingParser(prog="program")
    children = parser.add_subparsers(dest="verb", required=True)
    for name, flag in (("segment", "--columns"), ("serve", "--port")):
        children.add_parser(name, fill=fill(name, flag))
    return parser, built


def error_of(parser, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(arguments)
    assert stop.value.code == 2
    return capsys.readouterr()


def test_parser_builds_only_the_chosen_verb_and_only_once(verbs):
    parser, built = verbs
    assert built == []
    for _ in range(2):
        assert parser.parse_args(["serve", "--preset", "full"]).preset == "full"
    assert built == ["serve"]


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["sement"], "did you mean segment?"),
        (["serve", "--preset", "ful"], "did you mean full?"),
        (["serve", "--prot"], "did you mean --port?"),
        (["serve", "--jsn=1"], "did you mean --json?"),
    ],
)
def test_parser_suggests_the_nearest_name(verbs, capsys, arguments, suggestion):
    error = error_of(verbs[0], arguments, capsys)
    assert error.out == ""
    assert suggestion in error.err
    assert "--help`." in error.err


@pytest.mark.parametrize("arguments", [["zzz"], ["serve", "--zzz"], ["serve", "--column"]])
def test_parser_suggests_nothing_from_other_verbs_or_without_a_near_name(verbs, capsys, arguments):
    assert "did you mean" not in error_of(verbs[0], arguments, capsys).err


def test_parser_accepts_no_abbreviation(verbs, capsys):
    assert "did you mean --preset?" in error_of(verbs[0], ["serve", "--pres", "full"], capsys).err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--json", "--preset", "ful"], "invalid choice: 'ful'"),
        (["serve", "--zzz", "--json"], "unrecognized arguments: --zzz"),
        (["sement", "--json"], "did you mean segment?"),
        (["--json"], "the following arguments are required: verb"),
    ],
)
def test_parser_with_json_prints_the_error_as_one_object(verbs, capsys, arguments, message):
    error = error_of(verbs[0], arguments, capsys)
    body = json.loads(error.out)
    assert set(body) == {"error", "type"}
    assert body["type"] == "ArgumentError"
    assert message in body["error"]
    assert message in error.err


def test_parser_remembers_no_json_flag_of_an_earlier_call(verbs, capsys):
    error_of(verbs[0], ["zzz", "--json"], capsys)
    assert error_of(verbs[0], ["zzz"], capsys).out == ""


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_of_every_verb_has_a_help_text(verb, capsys):
    parser = build_parser()
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([verb, "--help"])
    assert stop.value.code == 0
    assert f"usage: coprs-deploy {verb}" in capsys.readouterr().out
    (verbs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for action in verbs.choices[verb]._actions:
        assert action.help, (verb, action.dest)
        assert not action.help.endswith("."), (verb, action.dest)


@pytest.mark.parametrize(
    ("as_json", "shown"), [(False, "2 images\n"), (True, '{"num_images": 2}\n')]
)
def test_print_result_prints_text_or_one_object(capsys, as_json, shown):
    print_result(argparse.Namespace(json=as_json), {"num_images": 2}, "2 images")
    assert capsys.readouterr().out == shown


def test_log_writes_to_stderr_and_print_json_to_stdout(capsys):
    log("a line")
    print_json({"name": "größte"})
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ('{"name": "größte"}\n', "a line\n")
