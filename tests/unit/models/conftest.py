"""segment-anything as the peer of the models, without torchvision."""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest

STUBS = {
    "torchvision": (),
    "torchvision.ops": (),
    "torchvision.ops.boxes": ("batched_nms", "box_area"),
    "torchvision.transforms": (),
    "torchvision.transforms.functional": ("resize", "to_pil_image"),
}
"""What segment-anything imports of torchvision, and never calls in these tests."""


@pytest.fixture(scope="session")
def segment_anything():
    """The package ``segment_anything``, imported with stubs where torchvision is not installed."""
    if importlib.util.find_spec("segment_anything") is None:
        pytest.skip("segment-anything is not installed; pip install segment-anything --no-deps")
    stubs = {} if importlib.util.find_spec("torchvision") else STUBS
    with pytest.MonkeyPatch.context() as patch:
        for name, attributes in stubs.items():
            module = ModuleType(name)
            for attribute in attributes:
                setattr(module, attribute, None)
            patch.setitem(sys.modules, name, module)
        return importlib.import_module("segment_anything")
