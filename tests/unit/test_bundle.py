"""Bundles: opening, refusing damaged files, and refusing invalid manifests."""

import json
import os
import re
import shutil

import pytest

from coprs_deploy.artifacts import record_files
from coprs_deploy.bundle import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    EquivalenceRecord,
    GraphRecord,
    Manifest,
    PolicyRecord,
    hash_manifest,
    open_bundle,
    read_manifest,
    write_manifest,
)
from coprs_deploy.errors import BundleError, BundleIntegrityError
from coprs_deploy.prompts import PromptTemplate
from coprs_deploy.specs import GRAPH_NAMES, MASK_DECODER, PRIOR, Geometry, graph_specs

GEOMETRY = Geometry(image_size=128, patch_size=8, out_chans=64)


def manifest_of(root, policy_path="policy"):
    specs = graph_specs(GEOMETRY, 64)
    policy_files = record_files(root / policy_path)
    others = ("policy", MANIFEST_FILE)
    inside = tuple(f for f in record_files(root) if f.path.partition("/")[0] not in others)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        package_version="0.1.0",
        checkpoint_fingerprint="0" * 64,
        checkpoint_note="made by hand",
        geometry=GEOMETRY,
        graphs={
            name: GraphRecord(specs[name], "onnxruntime", "fp32", f"{name}.onnx")
            for name in GRAPH_NAMES
        },
        policy=PolicyRecord(
            path=policy_path,
            prompt=PromptTemplate("<image> {instruction}", "<image>"),
            hidden_size=64,
            min_pixels=784,
            max_pixels=12_544,
            files=policy_files,
        ),
        files=inside,
        toolchain={"onnx": "1.0"},
        gpu=None,
        equivalence=(EquivalenceRecord("end_to_end", 1e-6, 1e-7, 0.0, 1.0, 1.0, 3, True),),
    )


def write_files(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(f"the content of {name}".encode())


GRAPH_FILES = [f"{name}.onnx" for name in GRAPH_NAMES] + ["image_encoder.onnx.data"]
POLICY_FILES = ["config.json", "tokenizer/vocab.json"]


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "bundle"
    write_files(root, GRAPH_FILES)
    write_files(root / "policy", POLICY_FILES)
    write_manifest(root, manifest_of(root))
    return root


def change_manifest(root, change):
    file = root / MANIFEST_FILE
    data = json.loads(file.read_text())
    change(data)
    del data["sha256"]
    file.write_text(json.dumps({**data, "sha256": hash_manifest(data)}))


# Valid bundles


def test_open_bundle_returns_written_manifest(root):
    bundle = open_bundle(root)
    assert bundle.manifest == manifest_of(root)
    assert bundle.graph_path(PRIOR) == root / "prior.onnx"
    assert bundle.policy_path == root / "policy"
    assert not bundle.manifest.policy.is_external
    assert open_bundle(str(root)) == bundle


def test_open_bundle_moved_directory_opens(root):
    moved = root.rename(root.parent / "elsewhere")
    assert open_bundle(moved).policy_path == moved / "policy"


def test_open_bundle_absolute_external_policy_is_checked(root, tmp_path):
    outside = shutil.move(root / "policy", tmp_path / "shared policy")
    (root / MANIFEST_FILE).unlink()
    write_manifest(root, manifest_of(root, str(outside)))
    bundle = open_bundle(root)
    assert bundle.manifest.policy.is_external
    assert bundle.policy_path == outside
    (outside / "config.json").write_text("another policy")
    with pytest.raises(BundleIntegrityError, match=r"shared policy/config\.json has 14 bytes"):
        open_bundle(root)
    shutil.rmtree(outside)
    with pytest.raises(BundleIntegrityError, match="shared policy is missing"):
        open_bundle(root)


def test_open_bundle_relative_external_policy_moves_along(root):
    shutil.move(root / "policy", root.parent / "beside")
    (root / MANIFEST_FILE).unlink()
    write_manifest(root, manifest_of(root, "../beside"))
    moved = root.parent.rename(root.parent.parent / "moved together") / root.name
    bundle = open_bundle(moved)
    assert bundle.manifest.policy.is_external
    assert (bundle.policy_path / "config.json").is_file()
    (bundle.policy_path / "config.json").write_text("another policy")
    with pytest.raises(BundleIntegrityError, match="has 14 bytes"):
        open_bundle(moved)


def test_read_manifest_needs_no_other_file(root):
    for name in GRAPH_FILES:
        (root / name).unlink()
    shutil.rmtree(root / "policy")
    assert read_manifest(root).checkpoint_note == "made by hand"


# Damaged files


@pytest.fixture(params=[*GRAPH_FILES, *(f"policy/{name}" for name in POLICY_FILES)])
def damaged(request, root):
    return root / request.param


def test_open_bundle_changed_byte_is_refused(root, damaged):
    content = bytearray(damaged.read_bytes())
    content[5] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(BundleIntegrityError, match=rf"{damaged} was changed \(SHA-256 differs\)"):
        open_bundle(root)


def test_open_bundle_truncated_file_is_refused(root, damaged):
    size = damaged.stat().st_size
    os.truncate(damaged, size - 1)
    with pytest.raises(
        BundleIntegrityError, match=f"{damaged} has {size - 1} bytes, not {size}: it was truncated"
    ):
        open_bundle(root)


def test_open_bundle_emptied_file_is_refused(root, damaged):
    os.truncate(damaged, 0)
    with pytest.raises(BundleIntegrityError, match=f"{damaged} has 0 bytes"):
        open_bundle(root)


def test_open_bundle_missing_file_is_refused(root, damaged):
    damaged.unlink()
    with pytest.raises(BundleIntegrityError, match=f"{damaged} is missing.*Export the checkpoint"):
        open_bundle(root)


def test_open_bundle_directory_instead_of_file_is_refused(root, damaged):
    damaged.unlink()
    damaged.mkdir()
    with pytest.raises(BundleIntegrityError, match=f"{damaged} is missing"):
        open_bundle(root)


def test_open_bundle_link_to_the_same_content_is_followed(root, damaged, tmp_path):
    damaged.rename(tmp_path / "blob")
    damaged.symlink_to(tmp_path / "blob")
    assert open_bundle(root).path == root


def test_open_bundle_link_to_other_content_is_refused(root, damaged, tmp_path):
    size = damaged.stat().st_size
    damaged.unlink()
    (tmp_path / "blob").write_bytes(b"x" * size)
    damaged.symlink_to(tmp_path / "blob")
    with pytest.raises(BundleIntegrityError, match=f"{damaged} was changed"):
        open_bundle(root)


@pytest.mark.parametrize("name", [".gitattributes", ".cache/huggingface/lock", "README.md"])
@pytest.mark.parametrize("folder", ["", "policy"])
def test_open_bundle_files_of_a_model_hub_are_ignored(root, folder, name):
    write_files(root / folder, [name])
    assert open_bundle(root).path == root


def test_open_bundle_several_damaged_files_are_all_named(root):
    (root / "prior.onnx").unlink()
    (root / "mask_decoder.onnx").write_text("other")
    with pytest.raises(BundleIntegrityError, match=r"mask_decoder\.onnx") as caught:
        open_bundle(root)
    assert "prior.onnx is missing" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["extra.onnx", "graphs/extra.onnx", "policy/extra.py", "policy/tokenizer/extra.bin"],
)
def test_open_bundle_extra_file_is_refused(root, name):
    write_files(root, [name])
    with pytest.raises(BundleIntegrityError, match=f"{root / name} is not a file of this bundle"):
        open_bundle(root)


@pytest.mark.parametrize("name", ["extra", "policy/extra"])
def test_open_bundle_link_to_directory_is_refused(root, tmp_path, name):
    (root / name).symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(BundleIntegrityError, match=f"{root / name} is a link"):
        open_bundle(root)


def test_open_bundle_dangling_link_is_refused(root):
    (root / "extra").symlink_to(root / "nowhere")
    with pytest.raises(BundleIntegrityError, match=f"{root / 'extra'} is a link"):
        open_bundle(root)


def test_open_bundle_missing_policy_is_named(root):
    shutil.rmtree(root / "policy")
    with pytest.raises(BundleIntegrityError, match="policy is missing"):
        open_bundle(root)


# Manifests with paths outside


@pytest.mark.parametrize("place", ["files", "policy"])
@pytest.mark.parametrize("path", ["../outside", "a/../../outside", "/etc/hostname", ".."])
def test_open_bundle_listed_path_outside_is_refused(root, place, path):
    write_files(root.parent, ["outside"])
    record = {"path": path, "size_bytes": 1, "sha256": "0" * 64}

    def change(data):
        (data["files"] if place == "files" else data["policy"]["files"]).append(record)

    change_manifest(root, change)
    with pytest.raises(BundleIntegrityError, match=re.escape(f"lists {path!r}, which leaves")):
        open_bundle(root)


@pytest.mark.parametrize(
    "path", ["../outside.onnx", "/elsewhere/outside.onnx", "missing.onnx", "", "."]
)
def test_open_bundle_unlisted_graph_file_is_refused(root, path):
    write_files(root.parent, ["outside.onnx"])

    def change(data):
        data["graphs"][PRIOR]["file"] = path

    change_manifest(root, change)
    with pytest.raises(BundleError, match="prior"):
        open_bundle(root)


@pytest.mark.parametrize("path", ["policy/../../outside", "elsewhere", "", "."])
def test_open_bundle_other_policy_path_is_refused(root, path):
    shutil.copytree(root / "policy", root.parent / "outside")

    def change(data):
        data["policy"]["path"] = path

    change_manifest(root, change)
    with pytest.raises(BundleError, match=r"starts with '\.\.'"):
        open_bundle(root)


# Invalid manifests


@pytest.mark.parametrize("reader", [read_manifest, open_bundle])
def test_read_manifest_without_bundle_names_export_command(tmp_path, reader):
    for place in (tmp_path, tmp_path / "nowhere"):
        message = rf"no bundle at {place} \(no manifest\.json\); `coprs-deploy export .* {place}`"
        with pytest.raises(BundleError, match=message):
            reader(place)


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, "1", None])
def test_open_bundle_other_schema_version_is_refused_first(root, version):
    (root / MANIFEST_FILE).write_text(json.dumps({"schema_version": version, "extra": 1}))
    message = (
        rf"schema_version is {version!r} in .*manifest\.json; accepted: {SCHEMA_VERSION}; "
        r"export the checkpoint again: `coprs-deploy export CHECKPOINT --out .* --overwrite`"
    )
    with pytest.raises(BundleError, match=message):
        open_bundle(root)


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"schema_version": 1,}', b"\xff\xfe\x00", b"PK\3"]
)
def test_open_bundle_manifest_without_json_is_refused(root, content):
    (root / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json is not valid: .*; export"):
        open_bundle(root)


def test_open_bundle_edited_manifest_is_refused(root):
    file = root / MANIFEST_FILE
    text = file.read_text()
    file.write_text(text.replace("123.675", "123.676"))
    with pytest.raises(BundleIntegrityError, match=r"manifest\.json was changed \(SHA-256 differs"):
        open_bundle(root)
    file.write_text(json.dumps(json.loads(text), sort_keys=True))  # another layout
    assert open_bundle(root).manifest == manifest_of(root)


@pytest.mark.parametrize("data", [[], "bundle", 1, None])
def test_open_bundle_manifest_with_other_json_is_refused(root, data):
    (root / MANIFEST_FILE).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="schema_version is None"):
        open_bundle(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("files"), "missing required field `files`"),
        (lambda data: data.update(extra=1), "unknown field `extra`"),
        (lambda data: data["files"][0].update(size_bytes="1"), r"size_bytes"),
        (lambda data: data["geometry"].update(image_size=100), "image_size is 100"),
        (lambda data: data["policy"]["prompt"].update(text="none"), "exactly once"),
        (lambda data: data.update(schema_version=True), "schema_version"),
    ],
)
def test_open_bundle_wrong_manifest_field_is_named(root, change, message):
    change_manifest(root, change)
    with pytest.raises(BundleError, match=rf"manifest\.json is not valid: .*{message}"):
        open_bundle(root)


def test_read_manifest_path_with_a_space_is_quoted_in_the_command(tmp_path):
    with pytest.raises(BundleError, match=r"`coprs-deploy export CHECKPOINT --out '.*/my bundle'`"):
        read_manifest(tmp_path / "my bundle")


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_read_manifest_missing_graph_is_named(root, name):
    change_manifest(root, lambda data: data["graphs"].pop(name))
    with pytest.raises(BundleError, match=f"lists no graph '{name}'; export"):
        read_manifest(root)


def test_open_bundle_swapped_graphs_are_refused(root):
    def change(data):
        graphs = data["graphs"]
        graphs[PRIOR], graphs[MASK_DECODER] = graphs[MASK_DECODER], graphs[PRIOR]

    change_manifest(root, change)
    with pytest.raises(BundleError, match="prior"):
        open_bundle(root)


def test_open_bundle_errors_have_exit_code_1_for_integrity_and_2_for_missing(root, tmp_path):
    (root / "prior.onnx").unlink()
    with pytest.raises(BundleError) as caught:
        open_bundle(root)
    assert caught.value.exit_code == 1
    with pytest.raises(BundleError) as caught:
        open_bundle(tmp_path / "nowhere")
    assert caught.value.exit_code == 2
