"""Bundles that hold the policy as graphs: manifest, check against PyTorch, whole requests."""

import shutil

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from coprs_deploy import CoPRS
from coprs_deploy.bundle import open_bundle, read_manifest
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.conversion import ConversionOptions, random_checkpoint
from coprs_deploy.data.synthetic.examples import held_out_examples
from coprs_deploy.data.synthetic.presets import PRESETS
from coprs_deploy.errors import (
    BundleError,
    BundleIntegrityError,
    EquivalenceError,
    MissingDependencyError,
)
from coprs_deploy.export import ExportOptions, exporter
from coprs_deploy.export.tolerances import POLICY_TOLERANCES, PolicyTolerance
from coprs_deploy.export.verifier import verify_policy_graphs
from coprs_deploy.runtime import RuntimeOptions

pytest.importorskip("openvino", reason="OpenVINO is not installed")
pytest.importorskip("nncf", reason="NNCF is not installed")

from coprs_deploy.export.policy import graphs as policy_graphs
from coprs_deploy.export.policy import samples as policy_samples
from coprs_deploy.export.policy.check import compare_policy, computed_in_float32
from coprs_deploy.export.policy.graphs import export_policy_graphs, load_policy, round_weights
from coprs_deploy.export.policy.samples import decode_samples

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(made_once, tiny_checkpoint):
    """``tiny_checkpoint`` with its policy as float32 graphs only; read-only."""
    options = ExportOptions(policy_runtime="openvino", policy_precision="fp32")
    return made_once(
        "tiny-policy-graphs",
        lambda path: exporter.export_checkpoint(tiny_checkpoint, path, options),
    )


def test_export_writes_the_graphs_instead_of_the_weights(bundle):
    manifest = read_manifest(bundle)
    assert manifest.policy.path is None
    assert not (bundle / "policy").exists()
    listed = {file.path for file in manifest.files}
    assert {"policy_openvino/decoder.xml", "policy_openvino/embedding.npy"} <= listed
    found = manifest.policy_graphs
    assert (found.runtime, found.precision) == ("openvino", "fp32")
    assert found.equivalence.passed
    assert found.equivalence.token_agreement == 1
    assert found.equivalence.relative_error < 1e-4
    assert found.equivalence.tokens >= 4 * 8


def test_requests_equal_those_of_the_transformers_policy(bundle, tiny_bundle):
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    with CoPRS.load(bundle) as graphs, CoPRS.load(tiny_bundle) as weights:
        assert "openvino" in graphs.description
        assert "transformers" in weights.description
        found, expected = (c.segment(image, "the cup", max_targets=2) for c in (graphs, weights))
    assert found.response == expected.response
    np.testing.assert_allclose(found.prior_logits, expected.prior_logits, atol=1e-3)
    np.testing.assert_array_equal(found.masks, expected.masks)


def test_a_changed_graph_is_refused(bundle, tmp_path):
    copied = tmp_path / "bundle"
    copied.mkdir()
    for file in sorted(bundle.rglob("*")):
        target = copied / file.relative_to(bundle)
        target.mkdir() if file.is_dir() else target.write_bytes(file.read_bytes())
    weights = copied / "policy_openvino" / "decoder.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleIntegrityError, match=r"decoder\.bin was changed"):
        open_bundle(copied)


@pytest.mark.parametrize(
    ("policy", "device", "message"),
    [
        ("transformers", "cpu", r"OpenVINO graphs only: pass --policy openvino"),
        ("vllm", "cpu", r"OpenVINO graphs only: pass --policy openvino"),
    ],
)
def test_another_policy_needs_the_weights(bundle, policy, device, message):
    with pytest.raises(BundleError, match=message):
        CoPRS.load(bundle, RuntimeOptions(policy=policy, device=device))


def test_the_openvino_policy_needs_the_graphs(tiny_bundle):
    with pytest.raises(BundleError, match=r"no graphs of its policy: pass --policy transformers"):
        CoPRS.load(tiny_bundle, RuntimeOptions(policy="openvino"))


@pytest.mark.extended
def test_an_export_outside_the_tolerance_writes_nothing(tiny_checkpoint, tmp_path, monkeypatch):
    impossible = PolicyTolerance(0, 0, 1, 1, 1, "none")
    monkeypatch.setitem(POLICY_TOLERANCES, "fp32", impossible)
    options = ExportOptions(policy_runtime="both", policy_precision="fp32")
    with pytest.raises(EquivalenceError, match=r"fp32 graphs: .*accepted: 100% of the tokens"):
        exporter.export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options)
    assert list(tmp_path.iterdir()) == []


def test_the_check_notices_graphs_of_other_weights(bundle, tmp_path):
    random_checkpoint(tmp_path / "other", "tiny", options=ConversionOptions(seed=5))
    found = compare_policy(
        read_checkpoint(tmp_path / "other"),
        bundle / "policy_openvino",
        POLICY_TOLERANCES["int4"],
        lambda step: None,
    )
    assert not found.passed
    assert found.cosine < 0.9


def test_verify_compares_the_graphs_on_other_scenes(bundle, tiny_checkpoint, capsys):
    from coprs_deploy.cli.main import main

    command = ["verify", str(bundle), "--against", str(tiny_checkpoint), "--json"]
    assert main(command) == 0
    shown = msgspec.json.decode(capsys.readouterr().out)
    found = shown["policy_graphs"]
    assert shown["passed"] and found["passed"]
    assert found["token_agreement"] == 1
    exported = read_manifest(bundle).policy_graphs.equivalence
    assert found["relative_error"] != exported.relative_error


def test_verify_fails_if_only_the_graphs_of_the_policy_are_outside_the_tolerance(
    bundle, tiny_checkpoint, monkeypatch, capsys
):
    from coprs_deploy.cli.main import main

    monkeypatch.setitem(POLICY_TOLERANCES, "fp32", PolicyTolerance(0, 0, 1, 1, 1, "none"))
    assert main(["verify", str(bundle), "--against", str(tiny_checkpoint)]) == 1
    assert "outside the tolerance" in capsys.readouterr().out


def test_verify_without_openvino_warns_that_the_graphs_were_not_compared(
    bundle, tiny_checkpoint, monkeypatch
):
    def refuse(*arguments, **options):
        raise MissingDependencyError("OpenVINO is not installed")

    monkeypatch.setattr(policy_samples, "OpenVinoPolicy", refuse)
    with pytest.warns(UserWarning, match="graphs were not compared: OpenVINO is not installed"):
        assert verify_policy_graphs(bundle, tiny_checkpoint) is None


def test_a_large_decoder_is_checked_on_few_tokens(bundle, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(policy_samples, "LARGE_DECODER_BYTES", 0)
    monkeypatch.setattr(policy_samples, "MAX_TOKENS_LARGE", 3)
    examples = held_out_examples(PRESETS["plain"], 2, 0)
    checkpoint, graphs = read_checkpoint(tiny_checkpoint), bundle / "policy_openvino"
    samples = list(decode_samples(checkpoint, graphs, examples))
    assert [sample.num_written for sample in samples] == [3, 3]
    assert {len(sample.token_ids) for sample in samples} == {4}  # <REF_POS> is appended


def test_layers_are_compressed_one_by_one(tiny_checkpoint, tmp_path, monkeypatch, capfd):
    import openvino

    loads, steps = [], []
    monkeypatch.setattr(policy_graphs, "LAYERS_PER_LOAD", 1)
    monkeypatch.setattr(
        policy_graphs, "load_policy", lambda path: loads.append(path) or load_policy(path)
    )
    policy = read_checkpoint(tiny_checkpoint).policy_path
    export_policy_graphs(policy, tmp_path / "graphs", "int4", steps.append)
    assert steps == [
        *("load policy", "convert vision tower", "convert output head"),
        *("convert layer 1 of 2", "convert layer 2 of 2", "write decoder"),
    ]
    assert len(loads) == 4  # vision tower, head, first and second layer
    assert capfd.readouterr().out == ""
    graph = openvino.Core().read_model(tmp_path / "graphs" / "decoder.xml")
    nodes = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    types = [node.get_element_type().get_type_name() for node in nodes]
    assert types.count("i8") == 7 + 1  # products of the first layer, and the output head
    assert types.count("i4") == 7
    names = [node.get_friendly_name() for node in graph.get_ops()]
    assert len(set(names)) == len(names)


def test_graphs_hold_their_own_biases_and_norms(tiny_checkpoint, tmp_path, monkeypatch):
    import openvino

    convert = policy_graphs._convert

    def convert_and_overwrite(module, example):
        graph = convert(module, example)
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.data.fill_(float("nan"))
        return graph

    policy, half = read_checkpoint(tiny_checkpoint).policy_path, tmp_path / "bfloat16"
    shutil.copytree(policy, half)
    load_policy(policy).bfloat16().save_pretrained(half)
    monkeypatch.setattr(policy_graphs, "_convert", convert_and_overwrite)
    export_policy_graphs(half, tmp_path / "graphs", "int8", lambda step: None)
    for name in ("vision", "decoder"):
        graph = openvino.Core().read_model(tmp_path / "graphs" / f"{name}.xml")
        constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
        floats = [node for node in constants if node.get_element_type().is_real()]
        assert any("bias" in node.get_friendly_name() for node in floats)
        for node in floats:
            values = node.get_data().astype(np.float32)
            assert np.isfinite(values).all(), node.get_friendly_name()


def test_16_bit_weights_are_read_in_float32_and_restored(tiny_checkpoint):
    path = read_checkpoint(tiny_checkpoint).policy_path
    exact, half = load_policy(path), load_policy(path)
    round_weights(half)
    with torch.no_grad():
        for parameter, rounded in zip(exact.parameters(), half.parameters(), strict=True):
            parameter.copy_(rounded)
    ids = torch.tensor([[5, 9, 7, 3]])
    with torch.inference_mode():
        expected = exact.model(input_ids=ids).last_hidden_state
        with computed_in_float32(half):
            found = half.model(input_ids=ids).last_hidden_state
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_runtime": "onnx"}, "policy_runtime is 'onnx'; accepted: transformers, openvino"),
        ({"policy_precision": "fp16"}, "policy_precision is 'fp16'; accepted: fp32, bf16, int8"),
        ({"policy_precision": "int4"}, "accepted: --policy-precision with --policy-runtime"),
        (
            {"policy_runtime": "openvino", "external_policy": True},
            "accepted: --policy-runtime both, or no --external-policy",
        ),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ExportOptions(**options)


def test_inspect_shows_both_forms_of_the_policy(bundle, capsys):
    from coprs_deploy.cli.main import main

    assert main(["inspect", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "graphs: openvino fp32" in shown
    assert "100.0% of" in shown
    assert "\n  weights: " not in shown


def test_images_from_the_command_line_run_on_the_graphs(bundle, tmp_path, capsys):
    from coprs_deploy.cli.main import main

    image = tmp_path / "image.png"
    Image.new("RGB", (64, 48), "red").save(image)
    assert main(["segment", str(image), "the cup", "--bundle", str(bundle), "--json"]) in (0, 1)
    assert "openvino" in msgspec.json.decode(capsys.readouterr().out)["runtime"]
