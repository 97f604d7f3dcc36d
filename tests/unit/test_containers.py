"""Files of the containers: pins, hardening, and names that exist. No container is started here."""

import json
import re
import subprocess
import tomllib

import pytest
import yaml

from coprs_deploy.cli.main import build_parser
from tests import ROOT

CONTAINERS = ROOT / "containers"
DOCKERFILES = sorted(CONTAINERS.glob("*.Dockerfile"))
REQUIREMENTS = sorted(CONTAINERS.glob("requirements-*.txt"))


def instructions(path):
    """Return the instructions of a Dockerfile with their arguments, lines joined."""
    text = re.sub(r"^#.*\n", "", path.read_text("utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def pins(path):
    lines = [line for line in path.read_text("utf-8").splitlines() if line[:1] not in ("", "#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), path
    return {normal(name): version for name, version in (line.split("==") for line in lines)}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def compose(name="compose.yaml"):
    return yaml.safe_load((CONTAINERS / name).read_text("utf-8"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_image_is_pinned_and_runs_without_root(path):
    found = instructions(path)
    base = next(rest for name, rest in found if name == "ARG").partition("=")[2]
    assert re.search(r"@sha256:[0-9a-f]{64}$|:v?\d+\.\d+[\w.-]*$", base), base
    assert all(rest.split()[0] == "${BASE}" for name, rest in found if name == "FROM")
    after = found[max(i for i, (name, _) in enumerate(found) if name == "FROM") :]
    users = [rest for name, rest in after if name == "USER"]
    assert users and users[-1] in ("10001:10001", "triton-server")
    assert [name for name, _ in after].count("HEALTHCHECK") == 1


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_copied_files_exist_and_are_not_ignored(path):
    kept = set((ROOT / ".dockerignore").read_text("utf-8").split()) - {"#"}
    for name, rest in instructions(path):
        if name == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source.split('/')[0]}" in kept, source


@pytest.mark.parametrize("path", REQUIREMENTS, ids=lambda path: path.name)
def test_packages_have_the_versions_of_the_tests(path):
    tested, found = pins(ROOT / "constraints.txt"), pins(path)
    shared = found.keys() & tested.keys()
    assert {name: found[name] for name in shared} == {name: tested[name] for name in shared}


def test_cpu_image_has_all_packages_of_its_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = project["dependencies"] + extras["cpu"] + extras["edge"] + extras["serve"]
    names = {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in needed}
    assert names <= pins(CONTAINERS / "requirements-cpu.txt").keys()


def test_services_are_hardened_and_published_on_loopback_only():
    services = compose()["services"]
    assert services.keys() == {"server", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        if "build" not in service:
            assert re.search(r":v?[\d.]+@sha256:[0-9a-f]{64}$", service["image"]), name
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert source in compose()["volumes"] or (CONTAINERS / source).is_file(), mount


@pytest.mark.parametrize("name", ["bundle.yaml", "gpu.yaml"])
def test_additions_change_the_server_only(name):
    services = compose(name)["services"]
    assert services.keys() == {"server"}
    arguments = compose()["services"]["server"] | services["server"]
    build_parser().parse_args(["serve", *arguments["command"]])
    dockerfile = services["server"].get("build", {}).get("dockerfile", "containers/cpu.Dockerfile")
    assert (ROOT / dockerfile).is_file()


@pytest.mark.parametrize("name", ["run_triton.sh", "check_image.sh"])
def test_shell_scripts_have_no_syntax_error(name):
    assert subprocess.run(["sh", "-n", CONTAINERS / name], check=False).returncode == 0


def test_triton_script_is_marked_and_names_files_that_exist():
    script = (CONTAINERS / "run_triton.sh").read_text("utf-8")
    assert "NEVER RUN" in script
    assert "containers/triton.Dockerfile" in script


def dashboard():
    return json.loads((CONTAINERS / "grafana" / "server.json").read_text("utf-8"))


def test_dashboard_panels_use_the_data_source_of_the_compose_file():
    (source,) = yaml.safe_load((CONTAINERS / "grafana/datasource.yaml").read_text("utf-8"))[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 5
    for panel in panels:
        targets = panel["targets"]
        uids = {each["datasource"]["uid"] for each in (panel, *targets)}
        assert uids == {source["uid"]}, panel["title"]
        assert all(target["expr"] for target in targets)
