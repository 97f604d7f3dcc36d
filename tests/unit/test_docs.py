"""README, docs and the READMEs of the root folders: links, commands and names that exist."""

import argparse
import ast
import errno
import importlib
import itertools
import json
import os
import re
import shlex
import tomllib

import pytest

from coprs_deploy.cli.main import VERBS, build_parser
from tests import ROOT
from tests.scripts import load_script

LAB = ("export", "engines", "training", "benchmarks")
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / folder / "README.md" for folder in LAB),
]
CURRENT = [page for page in PAGES if page.name != "log.md"]  # a log keeps the commands of its day
RECIPES = [ROOT / "coprs_deploy" / folder / "recipes" for folder in ("training", "curriculum")]
LAB_RECIPES = ROOT / "training" / "recipes"
NOT_OURS = (
    "FP32 GEMM is not supported",  # TensorRT's own error
    *(f"PATH: {os.strerror(number)}" for number in (errno.ENOSPC, errno.EROFS, errno.EACCES)),
)
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def read(page):
    return page.read_text(encoding="utf-8")


def prose(page):
    """Return a page without its code blocks."""
    return FENCE.sub("", read(page))


def blocks(page, language):
    return [code for found, code in FENCE.findall(read(page)) if found == language]


def code_spans(page):
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def commands(page):
    """Return the commands of the bash blocks as words, continuation lines joined."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def anchors(page):
    """Return the anchors of a page's headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def help_text(verb, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([verb, "--help"])
    return capsys.readouterr().out


def options(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


def recipe(source):
    """Return the tables of a recipe, those of its base included."""
    named = [folder / f"{source}.toml" for folder in RECIPES]
    path = next((p for p in (ROOT / source, *named) if p.is_file()), None)
    assert path, f"no recipe {source}"
    tables = tomllib.loads(read(path))
    return [*(recipe(tables["base"]) if "base" in tables else []), tables]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files_and_headings(page):
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page))
    for link in links:
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_are_accepted(page, monkeypatch):
    targets = set(re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    for program, *arguments in commands(page):
        if program == "coprs-deploy":
            build_parser().parse_args(arguments)
            if arguments[0] == "train" and not arguments[1].startswith("--"):
                check_recipe(arguments[1:])
        elif program == "make":
            assert arguments[0] in targets, arguments
        elif program.endswith("python") and arguments[0].startswith(LAB):
            parse_with_script(arguments, monkeypatch)
        elif program == "docker" and "-f" in arguments:
            assert (ROOT / arguments[arguments.index("-f") + 1]).is_file(), arguments
        elif program.endswith(".sh"):
            assert (ROOT / program).is_file(), program
            check_recipe(arguments)
        else:
            assert program in ("pip", "curl", "docker"), program


def parse_with_script(arguments, monkeypatch):
    """Run a script until its arguments are parsed."""
    script, parse = load_script(arguments[0]), argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, given=None):
        parse(parser, given)
        raise StopIteration

    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        script.main(arguments[1:])


def check_recipe(arguments):
    """Check the recipe, and that the keys of --set are written in it."""
    tables = recipe(arguments[0])
    for option, setting in itertools.pairwise(arguments):
        if option == "--set":
            keys = setting.partition("=")[0].split(".")
            assert any(lookup(table, keys) for table in tables), setting


def lookup(table, keys):
    for key in keys:
        if not isinstance(table, dict) or key not in table:
            return False
        table = table[key]
    return True


def test_options_and_make_targets_in_prose_exist(capsys):
    scripts = [path for folder in LAB for path in (ROOT / folder).glob("*.py")]
    known = {verb: options(help_text(verb, capsys)) for verb in VERBS}
    everywhere = set().union(*known.values(), *(options(read(script)) for script in scripts))
    makefile = read(ROOT / "Makefile")
    for page in CURRENT:
        for span in code_spans(page):
            words = span.split()
            if span.startswith("coprs-deploy ") and words[1] in known:
                assert options(span) <= known[words[1]], (page.name, span)
            elif words[0] in known or span.startswith("--"):
                assert options(span) <= everywhere, (page.name, span)
            elif words[0] == "make" and len(words) == 2:
                assert f"\n{words[1]}:" in makefile, (page.name, span)


def test_extras_of_install_lines_exist_and_are_documented():
    extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    for page in CURRENT:
        named = re.findall(r"\.\[([\w,-]+)\]", read(page))
        assert {extra for names in named for extra in names.split(",")} <= set(extras), page.name
    table = read(ROOT / "docs" / "install.md")
    assert all(f"| `{extra}` |" in table for extra in extras)


def test_names_that_python_blocks_import_exist():
    for page in CURRENT:
        for code in blocks(page, "python"):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names), page.name


def test_every_verb_is_in_the_table_of_the_readme():
    readme = read(ROOT / "README.md")
    for verb in VERBS:
        assert f"| `{verb}" in readme, verb


def test_recipes_named_in_prose_exist():
    recipes = {path.stem for folder in (*RECIPES, LAB_RECIPES) for path in folder.glob("*.toml")}
    for page in CURRENT:
        named = {span for span in code_spans(page) if re.fullmatch(r"(grpo|supervised)_\w+", span)}
        assert named <= recipes, page.name


def test_every_grpo_setting_of_the_page_exists():
    from coprs_deploy.training.recipe import load_recipe

    page = read(ROOT / "docs" / "train.md")
    fields = type(load_recipe("grpo_7b").stages["grpo"]).__struct_fields__
    table = page.partition("| setting of")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
    named = {field for cell in cells for field in re.findall(r"`(\w+)`", cell)}
    assert {"mode", "num_generations", "lora", "reward_weights"} <= named <= set(fields)


@pytest.mark.parametrize("name", ["troubleshooting", "operations"])
def test_errors_quoted_in_a_page_are_texts_of_the_code(name):
    sources = (ROOT / "coprs_deploy").rglob("*.py")
    texts = [text for source in sources for text in map(message, ast.walk(ast.parse(read(source))))]
    page = re.sub(r"`[^`]+`", "", prose(ROOT / "docs" / f"{name}.md"))
    quotes = re.findall(r'"([^"]+)"', page)
    assert len(quotes) > {"troubleshooting": 30, "operations": 10}[name]
    for quote in quotes:
        pattern = ".*".join(re.escape(part.strip()) for part in quote.split("..."))
        assert quote in NOT_OURS or any(re.search(pattern, text) for text in texts), quote


def message(node):
    """Return the text of a string or an f-string."""
    if isinstance(node, ast.JoinedStr):
        return "".join(message(part) or "{}" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else ""


def test_metrics_of_the_full_preset_are_those_of_its_report():
    report = json.loads(read(ROOT / "training/reports/full-further/report.json"))["generated"]
    giou, precision = (f"{report[name]:.3f}"[1:] for name in ("giou", "precision_at_50"))
    sentence = f"reach a gIoU of {giou} and a P@0.5 of {precision} on held-out scenes"
    assert sentence in " ".join(read(ROOT / "README.md").split())
