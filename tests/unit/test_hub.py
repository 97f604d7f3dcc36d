"""Bundles and policies on the Hugging Face hub, against a local server that speaks its API."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import close_session, constants

from coprs_deploy import CoPRS, demo
from coprs_deploy.bundle import open_bundle
from coprs_deploy.cli.main import main
from coprs_deploy.errors import BundleIntegrityError, HubError, MissingDependencyError
from coprs_deploy.hub import (
    HubLocation,
    check_known_files,
    hub_location,
    local_bundle,
    local_policy,
)
from coprs_deploy.publishing import push_bundle
from tests.unit.hub_server import TOKEN, Repository

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning"
)  # huggingface_hub 2.4 uploads LFS files in this way

NAME = "lab/demo"
LOCATION = f"hf://{NAME}"


@pytest.fixture
def login(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def uploaded(hub, monkeypatch):
    """The demo bundle on the hub, uploaded by push_bundle; requests are counted from here."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_bundle(demo.BUNDLE, LOCATION)
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    hub.sent.clear()
    return hub.repositories[NAME]


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("hf://lab/model", "lab/model", "main"),
        ("hf://lab/model@v1.0", "lab/model", "v1.0"),
        ("hf://lab/model@refs/pr/3", "lab/model", "refs/pr/3"),
        ("hf://models/lab/model", "lab/model", "main"),
        (str(Path("hf://lab/model@v1.0")), "lab/model", "v1.0"),
    ],
)
def test_location_is_parsed(text, repository, revision):
    assert hub_location(text) == HubLocation(repository, revision)


@pytest.mark.parametrize("text", ["hf://model", "hf://lab/model/file", "hf://lab/model@", "hf://"])
def test_other_location_is_refused(text):
    with pytest.raises(ValueError, match=r"accepted: hf://org/name"):
        hub_location(text)


@pytest.mark.parametrize("path", ["bundle", Path("/models/hf"), "hf", "./hf:x"])
def test_local_path_is_no_location(path):
    assert hub_location(path) is None
    assert local_bundle(path) == local_policy(path) == Path(path)


def test_pushed_bundle_is_complete_and_loads(hub, uploaded, scene):
    files = uploaded.commits[uploaded.references["main"]]
    assert {"README.md", "manifest.json", "policy/model.safetensors"} <= set(files)
    root = local_bundle(LOCATION)
    assert root.name == uploaded.references["main"]
    assert open_bundle(LOCATION).manifest.policy.path == "policy"
    with CoPRS.load(LOCATION, policy="openvino") as coprs:
        result = coprs.segment(scene, "the largest red circle")
    with CoPRS.load(policy="openvino") as coprs:
        expected = coprs.segment(scene, "the largest red circle")
    assert result.response == expected.response
    assert np.array_equal(result.masks, expected.masks)


def test_download_has_listed_files_only_and_happens_once(hub, uploaded):
    local_bundle(LOCATION)
    listed = {f.path for f in open_bundle(demo.BUNDLE).manifest.files}
    assert set(hub.sent) >= {"manifest.json", *listed}
    assert not {"README.md", ".gitattributes"} & set(hub.sent)
    assert len(hub.sent) == len(set(hub.sent))
    hub.sent.clear()
    local_bundle(LOCATION)
    assert hub.sent == []


def test_revision_is_a_branch_a_tag_or_a_commit(hub, uploaded, login):
    first = uploaded.references["main"]
    uploaded.references["v1"] = first
    push_bundle(demo.BUNDLE, LOCATION, card="# A second commit\n")
    second = uploaded.references["main"]
    assert first != second
    assert local_bundle(f"{LOCATION}@v1").name == first
    assert local_bundle(f"{LOCATION}@{first}").name == first
    assert local_bundle(LOCATION).name == second
    with pytest.raises(HubError, match=r"lab/demo has no revision 'v2'; accepted: a branch"):
        local_bundle(f"{LOCATION}@v2")


def test_cached_commit_needs_no_connection(hub, uploaded):
    commit = uploaded.references["main"]
    local_bundle(f"{LOCATION}@{commit}")
    hub.requests.clear()
    assert local_bundle(f"{LOCATION}@{commit}").name == commit
    assert hub.requests == []


def test_missing_private_and_gated_repositories_are_told_apart(hub, uploaded, login, monkeypatch):
    with pytest.raises(HubError, match=r"has no repository lab/other, or it is private"):
        local_bundle("hf://lab/other")
    uploaded.is_private = True
    assert local_bundle(LOCATION).name == uploaded.references["main"]
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"or it is private; check the name, or log in"):
        local_bundle(LOCATION)
    uploaded.is_private, uploaded.is_gated = False, True
    with pytest.raises(HubError, match=r"gated: ask for access at http://127.0.0.1:\d+/lab/demo"):
        local_bundle(LOCATION)


def test_wrong_token_is_named(hub, uploaded, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match=r"refuses access to hf://lab/demo \(401: .*HF_TOKEN"):
        local_bundle(LOCATION)


@pytest.mark.parametrize("how", ["down", "failing"])
def test_unreachable_hub_is_replaced_by_the_cache_with_a_warning(hub, uploaded, monkeypatch, how):
    root = local_bundle(LOCATION)
    if how == "failing":
        hub.failure = 503
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(UserWarning, match=r"cannot be reached .*hf://lab/demo is taken from the c"):
        assert local_bundle(LOCATION) == root


def test_unreachable_hub_without_a_cache_is_an_error(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with (
        pytest.warns(UserWarning, match="cannot be reached"),
        pytest.raises(HubError, match=r"is not in the cache, .*or pass a local directory"),
    ):
        local_bundle(LOCATION)


def test_offline_mode_uses_the_cache_silently(hub, uploaded, monkeypatch):
    root = local_bundle(LOCATION)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()  # it remembers whether it is offline
    try:
        assert local_bundle(LOCATION) == root
        with pytest.raises(HubError, match="without HF_HUB_OFFLINE"):
            local_bundle("hf://lab/other")
        assert hub.requests == []
    finally:
        monkeypatch.undo()
        close_session()


def test_incomplete_cache_is_completed_or_named(hub, uploaded):
    commit = uploaded.references["main"]
    root = local_bundle(LOCATION)
    (root / "prior.onnx").resolve().unlink()
    (root / "prior.onnx").unlink()
    hub.failure = 503
    with pytest.warns(UserWarning), pytest.raises(HubError, match=r"not as a whole|lacks it"):
        local_bundle(LOCATION)
    hub.failure = None
    assert (local_bundle(f"{LOCATION}@{commit}") / "prior.onnx").is_file()


def test_repository_without_a_bundle_is_named(hub):
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit({"config.json": b"{}"})
    with pytest.raises(HubError, match=r"has no manifest.json, so it is not a bundle"):
        local_bundle(LOCATION)
    hub.repositories[NAME].commit({"manifest.json": b"[]"})
    with pytest.raises(HubError, match=r"not that of a bundle .*coprs-deploy push"):
        local_bundle(LOCATION)


@pytest.mark.parametrize(
    "name", ["policy/model.py", "policy/pytorch_model.bin", "../x.json", "/etc/x.json", "a/b.onnx"]
)
def test_unknown_file_is_never_downloaded(hub, uploaded, name):
    data = json.loads((demo.BUNDLE / "manifest.json").read_text())
    data["files"].append({"path": name, "size_bytes": 1, "sha256": "0"})
    uploaded.commit({"manifest.json": json.dumps(data).encode(), name: b"x"})
    with pytest.raises(HubError, match="which is not downloaded from the hub; accepted: manifest"):
        local_bundle(LOCATION)
    assert hub.sent == ["manifest.json"]


def test_changed_file_is_found(hub, uploaded):
    files = uploaded.commits[uploaded.references["main"]]
    uploaded.commit(files | {"prior.onnx": files["prior.onnx"][:-1] + b"?"})
    with pytest.raises(BundleIntegrityError, match=r"prior\.onnx was changed"):
        open_bundle(LOCATION)


def test_push_replaces_an_earlier_bundle_and_keeps_the_card(hub, uploaded, login):
    files = uploaded.commits[uploaded.references["main"]]
    made = files["README.md"].decode()
    assert made.startswith("---\nlibrary_name: coprs-deploy\n")
    assert "| image_encoder | onnxruntime | fp32 |" in made
    assert 'CoPRS.load("hf://lab/demo")' in made
    stale = {"README.md": b"# By hand", "old.onnx": b"old", "notes.pdf": b"notes"}
    uploaded.commit(files | stale)
    push_bundle(demo.BUNDLE, LOCATION)
    files = uploaded.commits[uploaded.references["main"]]
    assert (files["README.md"], "old.onnx" in files, "notes.pdf" in files) == (
        b"# By hand",
        False,
        True,
    )


def test_push_goes_to_a_branch_and_takes_the_card_of_the_bundle(hub, login, tmp_path):
    bundle = shutil.copytree(demo.BUNDLE, tmp_path / "demo" / "bundle")
    shutil.copytree(demo.CHECKPOINT, tmp_path / "demo" / "checkpoint")
    (bundle / "README.md").write_text("# Its own card\n")
    url = push_bundle(bundle, f"{LOCATION}@next", private=True, message="From a test")
    repository = hub.repositories[NAME]
    assert repository.is_private
    assert list(repository.commits[repository.references["main"]]) == [".gitattributes"]
    files = repository.commits[repository.references["next"]]
    assert files["README.md"] == b"# Its own card\n"
    assert repository.messages[-1] == "From a test"
    assert url == f"{hub.url}/lab/demo/commit/{repository.references['next']}"


def test_push_without_a_token_or_to_a_commit_is_refused(hub):
    with pytest.raises(HubError, match=r"refuses access .*log in with `hf auth login`"):
        push_bundle(demo.BUNDLE, LOCATION)
    with pytest.raises(ValueError, match="accepted: a branch to push to"):
        push_bundle(demo.BUNDLE, f"{LOCATION}@{'0' * 40}")
    assert hub.repositories == {}


def test_verbs_push_and_inspect_a_bundle_on_the_hub(hub, login, capsys):
    assert main(["push", str(demo.BUNDLE), LOCATION, "--license", "apache-2.0", "--json"]) == 0
    commit = hub.repositories[NAME].references["main"]
    assert json.loads(capsys.readouterr().out)["commit"].endswith(commit)
    files = hub.repositories[NAME].commits[commit]
    assert "\nlicense: apache-2.0\n" in files["README.md"].decode()
    assert main(["inspect", LOCATION]) == 0
    assert f"{commit}: all files match their hashes" in capsys.readouterr().out
    assert main(["inspect", "hf://lab/other"]) == 2
    assert "has no repository lab/other" in capsys.readouterr().err


def test_policy_is_converted_from_the_hub(hub, tiny_checkpoint, tmp_path):
    policy = tiny_checkpoint / "policy"
    files = {path.name: path.read_bytes() for path in policy.iterdir()}
    hub.repositories["lab/policy"] = Repository()
    extra = {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"x", "onnx/a.json": b"{}"}
    commit = hub.repositories["lab/policy"].commit(files | extra)
    root = local_policy("hf://lab/policy")
    assert root.name == commit
    assert {path.name for path in root.iterdir()} == set(files)
    hub.repositories["lab/policy"].commit({"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(HubError, match="has no weights in safetensors, the only format"):
        local_policy("hf://lab/policy")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r'hf:// needs huggingface_hub.*"\.\[hub\]"'):
        local_bundle(LOCATION)


def test_files_of_any_export_are_known():
    names = ["image_encoder.onnx.data", "prior.engine", "policy/merges.txt", "policy/LICENSE"]
    check_known_files([*names, "policy/tokenizer.model"], "a bundle")
