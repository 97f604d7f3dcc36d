"""Command-line options from option records."""

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from coprs_deploy.cli.options import GIB, Option, add_options, gib, read_options
from coprs_deploy.cli.runtime_arguments import GRAPHS, POLICY, QUEUE
from coprs_deploy.docstrings import attribute_docs
from coprs_deploy.export.options import ExportOptions
from coprs_deploy.runtime import RuntimeOptions


@dataclass(frozen=True)
class Base:
    """A record.

    Attributes:
        num_threads: threads per ``operator``; None selects the runtime's own number.
        cuda_graphs: capture the kernels.
    """

    num_threads: int | None = None
    cuda_graphs: bool = True


@dataclass(frozen=True)
class Record(Base):
    """A record on top of another.

    Attributes:
        overwrite: replace what exists, 100 %
            of it.
        name: a name.
        cache_dir: folder of the cache; None for no cache.
        sizes: sizes; empty for all.
        tags: labels.
        case_timeout_s: timeout of a run.
        max_memory_bytes: memory.

    More text.
    """

    overwrite: bool = False
    name: str = "plain"
    cache_dir: Path | None = None
    sizes: tuple[int, ...] = ()
    tags: list[str] = field(default_factory=list)
    case_timeout_s: float = 30.0
    max_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.name == "none":
            raise ValueError("name is 'none'; accepted: another name")


def numbers(text):
    try:
        return tuple(map(int, text.split(",")))
    except ValueError as error:
        raise ValueError(f"sizes is {text!r}; accepted: N,N") from error


OPTIONS = (
    Option("num_threads", parse=int),
    Option("cuda_graphs", help="disable CUDA graph capture"),
    Option("overwrite"),
    Option("name"),
    Option("cache_dir", parse=Path, metavar="DIR"),
    Option("sizes", "--only-sizes", parse=numbers),
    Option("tags", collect=sorted),
    Option("case_timeout_s", help="timeout in SECONDS"),
    Option("max_memory_bytes"),
)


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(prog="program")
    add_options(parser, Record, OPTIONS)
    return parser


def help_of(parser):
    return {a.option_strings[0]: a.help for a in parser._actions if a.dest != "help"}


def test_option_names_follow_the_fields_and_negate_true_ones(parser):
    assert list(help_of(parser)) == [
        *("--num-threads", "--no-cuda-graphs", "--overwrite", "--name", "--cache-dir"),
        *("--only-sizes", "--tags", "--case-timeout", "--max-memory"),
    ]


def test_option_help_is_the_attribute_documentation_with_the_default(parser):
    texts = help_of(parser)
    assert texts["--num-threads"] == "threads per operator (default: the runtime's own number)"
    assert texts["--no-cuda-graphs"] == "disable CUDA graph capture"
    assert texts["--overwrite"] == "replace what exists, 100 %% of it"
    assert texts["--name"] == "a name (default: plain)"
    assert texts["--cache-dir"] == "folder of the cache (default: no cache)"
    assert texts["--only-sizes"] == "sizes (default: all)"
    assert texts["--tags"] == "labels"
    assert texts["--case-timeout"] == "timeout in SECONDS"
    shown = parser.format_help()
    assert "--num-threads N" in shown
    assert "--cache-dir DIR" in shown
    assert "--only-sizes SIZES" in shown
    assert "--case-timeout SECONDS" in shown
    assert "--max-memory GIB" in shown
    assert "100 % of it" in shown


def test_read_options_without_options_gives_the_defaults_of_the_record(parser):
    assert read_options(parser.parse_args([]), Record, OPTIONS) == Record()


def test_read_options_takes_the_given_values(parser):
    given = "--num-threads 2 --no-cuda-graphs --overwrite --only-sizes 1,2 --tags b --tags a"
    arguments = parser.parse_args([*given.split(), "--case-timeout", "1.5", "--max-memory", "2"])
    record = read_options(arguments, Record, OPTIONS)
    assert record == Record(
        2, False, True, "plain", None, (1, 2), ["a", "b"], 1.5, max_memory_bytes=2 * GIB
    )


def test_read_options_prefers_a_given_value_to_a_default_of_the_caller(parser):
    arguments = parser.parse_args(["--name", "full"])
    record = read_options(arguments, Record, OPTIONS, name="other", overwrite=True)
    assert (record.name, record.overwrite) == ("full", True)


def test_read_options_lets_the_record_refuse_a_value(parser):
    arguments = parser.parse_args(["--name", "none"])
    with pytest.raises(ValueError, match="name is 'none'; accepted: another name"):
        read_options(arguments, Record, OPTIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only-sizes", "a"], "argument --only-sizes: sizes is 'a'; accepted: N,N"),
        (["--num-threads", "a"], "argument --num-threads: invalid int value: 'a'"),
        (["--max-memory", "0"], "argument --max-memory: 0 GiB is not a finite number above"),
    ],
)
def test_refused_value_shows_the_message_of_its_converter(parser, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_attribute_docs_hold_every_field_of_the_option_records():
    for record in (Record, RuntimeOptions, ExportOptions):
        assert set(attribute_docs(record)) == {field.name for field in fields(record)}
        assert all("`" not in text for text in attribute_docs(record).values())


def test_runtime_arguments_expose_every_runtime_option_but_two():
    exposed = {option.field for option in (*GRAPHS, *POLICY, *QUEUE)}
    assert {f.name for f in fields(RuntimeOptions)} - exposed == {"cache_dir", "max_cached_images"}


def test_gib_converts_to_bytes():
    assert gib("1.5") == 3 * GIB // 2


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e999"])
def test_gib_that_is_not_finite_and_above_zero_is_refused(text):
    with pytest.raises(ValueError, match=f"{text} GiB is not a finite number above 0"):
        gib(text)
