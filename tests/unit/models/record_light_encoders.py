"""Record what the public image encoders compute on seeded weights: ``tests/golden/encoders.npz``.

    pip install --no-deps mobilesam-mirror==1.0.0 efficientsam==1.0.0 timm==1.0.31
    python -m tests.unit.models.record_light_encoders

Weights are drawn by name, so that a test draws the same. There is no package of NanoSAM: its
encoder is timm's ResNet-18 and the layers of its ``TimmImageEncoder``, written out here.
"""

import importlib.abc
import importlib.machinery
import sys
import warnings
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import nn

from coprs_deploy.encoder_config import ENCODERS, EfficientVitConfig
from coprs_deploy.model_config import SamConfig
from tests import ROOT

GOLDEN_FILE = ROOT / "tests" / "golden" / "encoders.npz"

XL = EfficientVitConfig(
    width_list=(8, 16, 16, 32, 32, 64),
    depth_list=(1, 1, 0, 1, 1, 1),
    block_list=("res", "fmb", "fmb", "fmb", "att@3", "att@3"),
    expand_list=(1.0, 2.0, 2.0, 2.0, 2.0, 3.0),
    fewer_norm_list=(False, False, False, False, True, True),
    qkv_dim=8,
    head_width=32,
    head_depth=1,
    head_expand=2.0,
)
"""The structure of XL0 and XL1 in a small size."""

CASES = {
    name: SamConfig().with_image_encoder(encoder)
    for name, encoder in {
        "tinyvit_5m": ENCODERS["tinyvit_5m"],
        "efficientvit_l0": ENCODERS["efficientvit_l0"],
        "efficientvit_xl": XL,
        "nanosam_resnet18": ENCODERS["nanosam_resnet18"],
    }.items()
}

UNUSED = ("norm_head.", "head.")
"""TinyViT's classifier."""


def draw_weights(shapes, seed=0):
    """Draw weights by name, with which activations neither grow nor vanish."""
    generator = np.random.default_rng(seed)
    drawn = {}
    for name, shape in sorted(shapes.items()):
        values = generator.standard_normal(shape, dtype=np.float32)
        if name.endswith("running_var"):
            values = 1 + 0.4 * np.tanh(values)
        elif len(shape) == 1:
            values = 0.1 * values + float(name.endswith("weight"))
        elif "pos_embedding" in name or "attention_biases" in name:
            values *= 0.3
        else:
            values /= np.sqrt(np.prod(shape[1:]))
        drawn[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return drawn


def draw_image(size, seed=1):
    """Draw an image (1, 3, S, S) whose lower three eighths are padding."""
    image = np.random.default_rng(seed).standard_normal((1, 3, size, size), dtype=np.float32)
    image[:, :, size * 5 // 8 :] = 0
    return torch.from_numpy(image)


def subsample(embedding):
    """Keep every 16th channel and 7th cell of an embedding."""
    return embedding[0, ::16, ::7, ::7].numpy()


class _Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An empty torchvision: the packages import it, the encoders use nothing of it."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = MagicMock()
        module.__path__, module.__version__ = [], "0"
        return module

    def exec_module(self, module):
        pass


class NanoSam(nn.Module):
    """NanoSAM's ``TimmImageEncoder`` (Apache-2.0, commit 6536336)."""

    def __init__(self):
        import timm

        super().__init__()
        self.backbone = timm.create_model("resnet18", pretrained=False, features_only=True)
        self.up_1 = nn.Sequential(
            nn.Conv2d(512, 256, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(256, 256, 3, 2, 1, 1),
            nn.GELU(),
        )
        self.proj = nn.Sequential(
            nn.Conv2d(256, 256, 3, padding=1), nn.GELU(), nn.Conv2d(256, 256, 1)
        )
        self.pos_embedding = nn.Parameter(torch.zeros(1, 256, 64, 64))

    def forward(self, image):
        return self.proj(self.up_1(self.backbone(image)[-1])) + self.pos_embedding


def _efficientvit(sizes):
    from efficientsam.models.efficientvit.backbone import EfficientViTLargeBackbone
    from efficientsam.models.efficientvit.sam import EfficientViTSamImageEncoder, SamNeck
    from efficientsam.models.nn.norm import set_norm_eps

    kinds = ["att" if kind == "att@5" else kind for kind in sizes.block_list]
    backbone = EfficientViTLargeBackbone(
        width_list=list(sizes.width_list),
        depth_list=list(sizes.depth_list),
        block_list=kinds,
        expand_list=list(sizes.expand_list),
        fewer_norm_list=list(sizes.fewer_norm_list),
        qkv_dim=sizes.qkv_dim,
    )
    last = len(sizes.width_list) - 1
    neck = SamNeck(
        fid_list=[f"stage{number}" for number in (last, last - 1, last - 2)],
        in_channel_list=list(reversed(sizes.width_list[-3:])),
        head_width=sizes.head_width,
        head_depth=sizes.head_depth,
        expand_ratio=sizes.head_expand,
        middle_op="fmb",
    )
    encoder = EfficientViTSamImageEncoder(backbone, neck)
    set_norm_eps(encoder, 1e-6)
    return encoder


def _peer(name, config):
    if name == "tinyvit_5m":
        from mobile_sam.modeling.tiny_vit_sam import TinyViT

        sizes = config.image_encoder
        return TinyViT(
            img_size=1024,
            num_classes=1000,
            embed_dims=list(sizes.embed_dims),
            depths=list(sizes.depths),
            num_heads=list(sizes.num_heads),
            window_sizes=list(sizes.window_sizes),
            drop_path_rate=0.0,
        )
    return NanoSam() if name.startswith("nanosam") else _efficientvit(config.image_encoder)


def main():
    """Record the file."""
    sys.meta_path.insert(0, _Torchvision())
    warnings.simplefilter("ignore")
    recorded = {}
    for name, config in CASES.items():
        peer = _peer(name, config)
        stored = peer.state_dict()
        shapes = {
            key: tuple(value.shape)
            for key, value in stored.items()
            if value.is_floating_point() and not key.startswith(UNUSED)
        }
        peer.load_state_dict(draw_weights(shapes), strict=False)
        peer.eval()  # TinyViT takes its biases into effect here
        with torch.inference_mode():
            embedding = peer(draw_image(config.geometry.image_size))
        recorded[name] = subsample(embedding)
        recorded[f"{name}.names"] = np.array(sorted(shapes))
        print(name, embedding.shape, float(embedding.std()), len(shapes))
    np.savez_compressed(GOLDEN_FILE, **recorded)


if __name__ == "__main__":
    main()
