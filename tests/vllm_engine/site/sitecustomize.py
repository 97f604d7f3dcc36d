"""Make PyPI's torchvision importable with a CPU build of torch, in every process of a test run.

PyPI has torchvision as a CUDA build only. Without CUDA its operators cannot be loaded, and its
import then fails because two operator schemas are missing; nothing here calls the operators.
"""

import importlib.abc
import importlib.util
import sys


class _TorchvisionFinder(importlib.abc.MetaPathFinder):
    library = None

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None and torch.version.hip is None:
            _TorchvisionFinder.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                _TorchvisionFinder.library.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
        return importlib.util.find_spec(name)


if importlib.util.find_spec("torchvision") and importlib.util.find_spec("torch"):
    sys.meta_path.insert(0, _TorchvisionFinder())
