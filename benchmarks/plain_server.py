"""Plain HTTP server of a CoPRS checkpoint, the peer of `server_load.py`.

    python benchmarks/plain_server.py --port 8001

FastAPI around `generate` of transformers and segment-anything's own modules in PyTorch, float32,
one request at a time under a lock: what one writes first. No queue limit, no streaming, no cache,
and a client that leaves is not noticed. Only the prior, which segment-anything lacks, and the
scaling of the policy's image are this package's, so that both servers see the same pixels.
"""

from __future__ import annotations

import argparse
import io
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Form, UploadFile
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from coprs_deploy import demo
from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model, read_checkpoint
from coprs_deploy.conversion.peer_encoder import segment_anything_encoder
from coprs_deploy.data.rle import encode_mask
from coprs_deploy.images import fit_pixel_count
from coprs_deploy.models.segmentation import mask_padding
from coprs_deploy.prompts import REFERENCE_TOKEN


class PlainPolicy:
    """Policy of a checkpoint through `generate`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        path = checkpoint.policy_path
        self._config = checkpoint.config
        self._model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self._images = AutoImageProcessor.from_pretrained(path, backend="pil")
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._reference_id = self._tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)

    def __call__(self, image: Image.Image, instruction: str) -> tuple[str, torch.Tensor | None]:
        """Write a response; return it with the (1, D) hidden state of its first ``<REF_POS>``."""
        prompt, limits = self._config.prompt, self._config.policy_image
        fitted = fit_pixel_count(np.asarray(image), limits.min_pixels, limits.max_pixels)
        inputs = self._images(images=[fitted], return_tensors="pt")
        num_tokens = int(inputs["image_grid_thw"].prod()) // self._images.merge_size**2
        text = prompt.text.replace("{instruction}", instruction.strip())
        text = text.replace(prompt.image_token, prompt.image_token * num_tokens)
        inputs |= self._tokenizer(text, return_tensors="pt", add_special_tokens=False)
        image_id = self._tokenizer.convert_tokens_to_ids(prompt.image_token)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_id).int()
        output = self._model.generate(
            **inputs,
            max_new_tokens=prompt.max_response_tokens,
            do_sample=False,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        ids = output.sequences[0, inputs["input_ids"].shape[1] :]
        found = (ids == self._reference_id).nonzero().flatten().tolist()
        response: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        if not found or found[0] + 1 >= len(output.hidden_states):
            return response, None
        return response, output.hidden_states[found[0] + 1][-1][0, -1:]


class PlainSegmentation:
    """segment-anything's ``Sam`` with the checkpoint's weights, and the prior."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        encoder = segment_anything_encoder(checkpoint)
        from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

        config, weights = checkpoint.config.model, load_segmentation_model(checkpoint)
        sam, geometry = config.sam, config.geometry
        channels, grid = geometry.out_chans, geometry.grid_size
        transformer = TwoWayTransformer(
            sam.decoder_depth, channels, sam.decoder_num_heads, sam.decoder_mlp_dim
        )
        self._sam: Any = Sam(
            encoder,
            PromptEncoder(channels, (grid, grid), 2 * (geometry.image_size,), sam.mask_in_chans),
            MaskDecoder(
                transformer_dim=channels,
                transformer=transformer,
                num_multimask_outputs=sam.num_mask_tokens - 1,
                iou_head_hidden_dim=sam.iou_head_hidden_dim,
            ),
            geometry.pixel_mean,
            geometry.pixel_std,
        )
        is_sam = {k: v for k, v in weights.state_dict().items() if not k.startswith("prior.")}
        self._sam.load_state_dict(is_sam, strict=False)  # pixel mean and std are no parameters
        self._sam.eval()
        self._prior, self._geometry = weights.prior.eval(), geometry

    def __call__(self, image: Image.Image, concentration: torch.Tensor) -> np.ndarray[Any, Any]:
        """Return the (H, W) bool mask of a concentration."""
        scale = self._geometry.image_size / max(image.size)
        width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
        resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        pixels = torch.from_numpy(resized.copy()).permute(2, 0, 1)[None].float()
        embedding = self._sam.image_encoder(self._sam.preprocess(pixels))
        prior = self._prior(embedding, concentration)
        prior = mask_padding(prior, torch.tensor([height, width]), self._geometry)
        sparse, dense = self._sam.prompt_encoder(points=None, boxes=None, masks=prior)
        logits, _ = self._sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=self._sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        original = (image.height, image.width)
        logits = self._sam.postprocess_masks(logits, (height, width), original)
        mask: np.ndarray[Any, Any] = (logits[0, 0] > self._sam.mask_threshold).numpy()
        return mask


def build_app(checkpoint: Checkpoint) -> FastAPI:
    """Build the application: one endpoint, one lock."""
    policy, segmentation = PlainPolicy(checkpoint), PlainSegmentation(checkpoint)
    lock, app = threading.Lock(), FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/segment")
    def segment(image: UploadFile, instruction: str = Form()) -> dict[str, Any]:
        decoded = Image.open(io.BytesIO(image.file.read())).convert("RGB")
        with lock, torch.inference_mode():
            response, concentration = policy(decoded, instruction)
            masks = [] if concentration is None else [segmentation(decoded, concentration)]
        rles = [encode_mask(mask) for mask in masks]
        return {
            "found": bool(masks),
            "masks": [{"size": [*rle.size], "counts": rle.counts} for rle in rles],
            "response": response,
            "timings": {},
        }

    return app


def main(arguments: Sequence[str]) -> int:
    """Serve until the process is interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8001, help="port; 0 for a free one")
    parser.add_argument(
        "--checkpoint", type=Path, default=demo.CHECKPOINT, help="default: the demo model"
    )
    parser.add_argument("--num-threads", type=int, help="threads of PyTorch (default: its own)")
    given = parser.parse_args(arguments)
    if given.num_threads:
        torch.set_num_threads(given.num_threads)
    app = build_app(read_checkpoint(given.checkpoint))
    with socket.create_server(("127.0.0.1", given.port)) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
