"""Equality with segment-anything on the same weights: names, encoders, mask decoder."""

from functools import partial

import pytest
import torch
from torch import nn

from coprs_deploy.model_config import SAM_SIZES, SegmentationConfig
from coprs_deploy.models import SegmentationModel
from coprs_deploy.models.mask_decoder import MaskDecoder, PromptEncoder
from coprs_deploy.models.sam_encoder import EncoderBlock, SamImageEncoder

pytestmark = pytest.mark.peer

TOLERANCES = {
    "encoder": (
        1e-4,
        "up to 12 blocks of float32 sums in another order; ViT-B measures below 1e-5",
    ),
    "block": (1e-5, "one block of float32 sums in another order; measured below 1e-6"),
    "neck": (1e-5, "two convolutions and two normalizations, the latter by another formula"),
    "prompt": (1e-5, "three small convolutions, the normalization by another formula"),
    "mask": (1e-5, "two two-way blocks of float32 sums in another order; measured below 1e-6"),
}
"""Largest difference over the largest absolute value of the peer's output, and why."""


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def draw(module, seed=0):
    """Draw every parameter and buffer of the peer, so that none is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        is_scale = name.endswith("weight") and tensor.ndim == 1
        std = 0.5 if "gaussian" in name else 0.02
        tensor.normal_(mean=1.0 if is_scale else 0.0, std=std, generator=generator)
    return module.eval()


def like(peer, ours):
    """Load the peer's weights into our module, strictly."""
    ours.load_state_dict(peer.state_dict(), strict=True)
    return ours.eval()


def assert_equal(found, expected, kind):
    limit, _ = TOLERANCES[kind]
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= limit * float(expected.abs().max())


def sam_encoder(segment_anything, config, **changes):
    """Build the peer's image encoder with our sizes."""
    from segment_anything.modeling import ImageEncoderViT

    geometry = config.geometry
    sizes = {
        "depth": config.encoder_depth,
        "embed_dim": config.encoder_embed_dim,
        "img_size": geometry.image_size,
        "mlp_ratio": config.mlp_ratio,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        "num_heads": config.encoder_num_heads,
        "patch_size": geometry.patch_size,
        "qkv_bias": True,
        "use_rel_pos": config.use_rel_pos,
        "global_attn_indexes": config.encoder_global_attn_indexes,
        "window_size": config.window_size,
        "out_chans": geometry.out_chans,
    }
    return ImageEncoderViT(**{**sizes, **changes})


def sam_decoder(segment_anything, config):
    """Build the peer's prompt encoder and mask decoder with our sizes."""
    from segment_anything.modeling import MaskDecoder as SamMaskDecoder
    from segment_anything.modeling import PromptEncoder as SamPromptEncoder
    from segment_anything.modeling import TwoWayTransformer

    geometry = config.geometry
    width = geometry.out_chans
    prompt_encoder = SamPromptEncoder(
        embed_dim=width,
        image_embedding_size=(geometry.grid_size, geometry.grid_size),
        input_image_size=(geometry.image_size, geometry.image_size),
        mask_in_chans=config.mask_in_chans,
    )
    mask_decoder = SamMaskDecoder(
        num_multimask_outputs=config.num_mask_tokens - 1,
        transformer=TwoWayTransformer(
            depth=config.decoder_depth,
            embedding_dim=width,
            mlp_dim=config.decoder_mlp_dim,
            num_heads=config.decoder_num_heads,
        ),
        transformer_dim=width,
        iou_head_depth=3,
        iou_head_hidden_dim=config.iou_head_hidden_dim,
    )
    return draw(prompt_encoder), draw(mask_decoder, seed=1)


def normal(*shape, seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", ["vit_b", "vit_l", "vit_h"])
def test_model_parameters_equal_sam(segment_anything, size):
    with torch.device("meta"):
        sam = segment_anything.sam_model_registry[size]()
        ours = SegmentationModel(SegmentationConfig(policy_hidden_size=8, sam=SAM_SIZES[size]))
    shapes = {
        name: tensor.shape
        for name, tensor in ours.state_dict().items()
        if not name.startswith("prior.")
    }
    assert shapes == {name: tensor.shape for name, tensor in sam.state_dict().items()}


def test_pixel_normalization_equals_sam(segment_anything):
    with torch.device("meta"):
        encoder = sam_encoder(segment_anything, SAM_SIZES["tiny"])
    prompt_encoder, mask_decoder = sam_decoder(segment_anything, SAM_SIZES["tiny"])
    sam = segment_anything.modeling.Sam(encoder, prompt_encoder, mask_decoder)
    geometry = SAM_SIZES["vit_h"].geometry
    assert sam.pixel_mean.flatten().tolist() == pytest.approx(geometry.pixel_mean)
    assert sam.pixel_std.flatten().tolist() == pytest.approx(geometry.pixel_std)


@pytest.mark.parametrize("use_rel_pos", [True, False])
def test_image_encoder_tiny_equals_sam(segment_anything, use_rel_pos):
    tiny = SAM_SIZES["tiny"]
    config = type(tiny).from_json({**tiny.to_json(), "use_rel_pos": use_rel_pos})
    peer = draw(sam_encoder(segment_anything, config))
    ours = like(peer, SamImageEncoder(config))
    image = normal(2, 3, 128, 128)
    assert_equal(ours(image), peer(image), "encoder")


@pytest.mark.extended
def test_image_encoder_vit_b_equals_sam(segment_anything):
    config = SAM_SIZES["vit_b"]
    peer = draw(sam_encoder(segment_anything, config))
    ours = like(peer, SamImageEncoder(config))
    image = normal(1, 3, 1024, 1024)
    image[:, :, 700:] = 0  # the padding of a landscape image
    assert_equal(ours(image), peer(image), "encoder")


@pytest.mark.parametrize("is_global", [False, True], ids=["windowed", "global"])
@pytest.mark.parametrize(
    "size",
    ["tiny", *(pytest.param(size, marks=pytest.mark.extended) for size in ("vit_l", "vit_h"))],
)
def test_encoder_block_equals_sam(segment_anything, size, is_global):
    from segment_anything.modeling.image_encoder import Block

    config = SAM_SIZES[size]
    grid = config.geometry.grid_size
    peer = draw(
        Block(
            dim=config.encoder_embed_dim,
            num_heads=config.encoder_num_heads,
            mlp_ratio=config.mlp_ratio,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=0 if is_global else config.window_size,
            input_size=(grid, grid),
        )
    )
    ours = like(peer, EncoderBlock(config, is_global=is_global))
    x = normal(1, grid, grid, config.encoder_embed_dim)
    # The residual would hide an error of the attention, so what the block adds is compared.
    assert_equal(ours(x) - x, peer(x) - x, "block")


@pytest.mark.parametrize("size", ["vit_l", "vit_h"])
def test_patches_and_neck_of_larger_sizes_equal_sam(segment_anything, size):
    config = SAM_SIZES[size]
    peer = draw(sam_encoder(segment_anything, config, depth=0))
    with torch.device("meta"):
        ours = SamImageEncoder(config)
    ours.blocks = nn.ModuleList()
    like(peer, ours.to_empty(device="cpu"))
    image = normal(1, 3, 1024, 1024)
    assert_equal(ours(image), peer(image), "neck")


@pytest.mark.parametrize("size", ["tiny", "vit_b"])
def test_prompt_encoder_and_positions_equal_sam(segment_anything, size):
    config = SAM_SIZES[size]
    peer, _ = sam_decoder(segment_anything, config)
    ours = like(peer, PromptEncoder(config))
    mask_size = config.geometry.mask_size
    prompts = 4 * normal(3, 1, mask_size, mask_size)
    prompts[:, :, -mask_size // 4 :] = -50.0
    sparse, dense = peer(points=None, boxes=None, masks=prompts)
    assert sparse.shape[1] == 0
    assert_equal(ours(prompts), dense, "prompt")
    assert_equal(ours.image_positions(), peer.get_dense_pe(), "prompt")


@pytest.mark.parametrize("size", ["tiny", "vit_b"])
def test_mask_decoder_batch_equals_sam_first_masks(segment_anything, size):
    config = SAM_SIZES[size]
    peer_prompts, peer = sam_decoder(segment_anything, config)
    prompt_encoder = like(peer_prompts, PromptEncoder(config))
    decoder = like(peer, MaskDecoder(config))
    geometry = config.geometry
    image = normal(1, geometry.out_chans, geometry.grid_size, geometry.grid_size)
    prompts = 4 * normal(3, 1, geometry.mask_size, geometry.mask_size)

    together = decoder(image, prompt_encoder.image_positions(), prompt_encoder(prompts))
    for n in range(3):
        sparse, dense = peer_prompts(points=None, boxes=None, masks=prompts[n : n + 1])
        masks, _ = peer.predict_masks(
            image_embeddings=image,
            image_pe=peer_prompts.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        assert_equal(together[n : n + 1], masks[:, :1], "mask")
        # The other masks of SAM are far away, so taking one of them would be seen.
        assert float((masks[:, 1:] - masks[:, :1]).abs().amax()) > 0.01 * float(masks.abs().max())
