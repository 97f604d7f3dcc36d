"""Compiling engines for a list of devices: profiles, refusals, and a real build without a GPU."""

import pytest

from coprs_deploy.bundle import open_bundle
from coprs_deploy.engines.trt.variants import TRT_VARIANTS
from coprs_deploy.export import ExportOptions
from coprs_deploy.specs import OptimizationProfile
from tests.scripts import load_script

SCRIPT = load_script("export/compile_engines.py")
PROFILES = SCRIPT.read_profiles(SCRIPT.PROFILES)


@pytest.mark.parametrize("name", PROFILES)
def test_device_profile_makes_valid_export_options(name):
    profile = PROFILES[name]
    options = ExportOptions(
        runtime=profile.variant,
        precision=profile.precision,
        targets=profile.targets,
        images=profile.images,
    )
    assert options.runtime in TRT_VARIANTS
    assert profile.description


def test_rtx_profile_capabilities_are_known_to_the_library():
    library = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    for profile in PROFILES.values():
        if profile.builds_anywhere:
            names = [name.replace("sm_", "SM") for name in profile.compute_capabilities]
            assert all(hasattr(library.ComputeCapability, name) for name in names)


def test_choose_profiles_default_is_all_that_build_anywhere():
    assert list(SCRIPT.choose_profiles(PROFILES, None)) == ["rtx"]
    assert list(SCRIPT.choose_profiles(PROFILES, "jetson-orin, rtx")) == ["jetson-orin", "rtx"]


@pytest.mark.parametrize("names", ["rtx,toaster", "", ","])
def test_main_unknown_device_exits_with_2_and_names_profiles(names, tmp_path, capsys):
    arguments = ["--checkpoint", "none", "--out", str(tmp_path), "--devices", names]
    with pytest.raises(SystemExit) as caught:
        SCRIPT.main(arguments)
    assert caught.value.code == 2
    assert f"accepted: {', '.join(PROFILES)}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[d]\nvariant = "onnx"\n', "variant is 'onnx'|missing required field"),
        ('[d]\ndescription = "x"\nvariant = "tensorrt"\nprecision = "fp16"\n', "compute_cap"),
        ("[d\n", "Expected"),
    ],
)
def test_read_profiles_invalid_file_is_refused(text, message, tmp_path):
    path = tmp_path / "devices.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        SCRIPT.read_profiles(path)


@pytest.mark.slow
def test_main_compiles_rtx_and_reports_devices_that_build_elsewhere(
    tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    monkeypatch.setattr(SCRIPT, "current_gpu", lambda: None)
    out = tmp_path / "bundles"
    arguments = ["--checkpoint", str(tiny_checkpoint), "--out", str(out)]
    arguments += ["--cache-dir", str(tmp_path / "cache"), "--external-policy"]
    assert SCRIPT.main([*arguments, "--devices", "rtx,jetson-orin"]) == 1
    shown = capsys.readouterr()
    rows = {line.split()[0]: line for line in shown.out.splitlines()}
    assert "not verified" in rows["rtx"] and "MB" in rows["rtx"]
    assert rows["jetson-orin"].endswith("FAILED")
    assert "jetson-orin: must be compiled on the device itself (sm_87)" in shown.err
    assert [path.name for path in out.iterdir()] == ["rtx"]
    bundle = open_bundle(out / "rtx")
    for graph in bundle.manifest.graphs.values():
        assert graph.engine.compute_capabilities == PROFILES["rtx"].compute_capabilities
    assert bundle.manifest.graphs["prior"].spec.targets == OptimizationProfile(1, 1, 4)
    assert bundle.manifest.policy.is_external
    assert SCRIPT.main([*arguments, "--devices", "rtx"]) == 1  # without --overwrite
    assert "pass --overwrite" in capsys.readouterr().err
