"""Options of the report of an evaluation."""

import argparse

import pytest

from coprs_deploy.cli.main import main
from coprs_deploy.cli.report_arguments import KEY_VARIABLE, add_report_arguments, read_judge
from coprs_deploy.evaluation.judge import JudgeSettings


def read(*words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    add_report_arguments(parser)
    return read_judge(parser.parse_args(words))


def test_read_judge_takes_options_and_the_key_of_the_environment(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    words = "--out o --judge-url http://h/v1 --judge-model m --judge-examples 9 --judge-timeout 5"
    settings = read(*words.split(), "--judge-concurrency", "2", "--judge-prices", "1", "2.5")
    assert settings == JudgeSettings("http://h/v1", "m", 9, 2, 5.0, (1.0, 2.5), "secret")


def test_read_judge_without_a_url_is_none():
    assert read() is None
    assert read("--out", "o") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--judge-url http://h/v1 --judge-model m", "name its --out DIR"),
        ("--out o --judge-url http://h/v1", "add --judge-model NAME"),
        ("--out o --judge-model m", "add --judge-url URL"),
        ("--out o --judge-url h/v1 --judge-model m", "accepted: http://HOST"),
        ("--out o --judge-url http://h --judge-model m --judge-examples 0", "at least 1"),
        ("--out o --judge-url http://h --judge-model m --judge-timeout 0", "a time above 0"),
    ],
)
def test_read_judge_wrong_options_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        read(*words.split())


def test_wrong_options_of_the_report_are_refused_before_the_work(tmp_path, capsys):
    arguments = ["evaluate", "--num-examples", "1", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--judge-model", "m"]) == 2
    assert "add --judge-url URL" in capsys.readouterr().err
    assert main([*arguments, "--training-run", str(tmp_path)]) == 2
    assert "log.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
