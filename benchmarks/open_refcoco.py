"""Measure how long RefCOCO's training split takes to open, and how much memory it takes.

A data set of the true size is generated: 50,000 references and 196,771 annotations on 19,994
images; 42,404 references with 120,624 sentences are for training. Image files are empty, because
opening reads none. Prints a line for people and one of JSON.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from coprs_deploy.bench.worker import call_once
from coprs_deploy.data.readers.refer import ReferExamples
from coprs_deploy.machine import peak_memory_bytes

NUM_IMAGES, NUM_ANNOTATIONS, NUM_REFERENCES = 19_994, 196_771, 50_000
TRAINING_IMAGES, TRAINING_REFERENCES, TRAINING_SENTENCES = 16_994, 42_404, 120_624
MASKS = 500
"""Masks that are decoded to measure one."""


def write_refcoco(root: Path, share: float = 1.0) -> int:
    """Write the files of the data set, or of a share of it; return the sentences for training."""
    random = np.random.default_rng(0)
    images, annotations, references, training, training_images = (
        max(1, int(share * number))
        for number in (
            *(NUM_IMAGES, NUM_ANNOTATIONS, NUM_REFERENCES),
            *(TRAINING_REFERENCES, TRAINING_IMAGES),
        )
    )
    folder, image_folder = root / "refcoco", root / "images/train2014"
    folder.mkdir(parents=True)
    image_folder.mkdir(parents=True)
    records, drawn, written = [], [], []
    for image_id in range(1, images + 1):
        name = f"COCO_train2014_{image_id:012d}.jpg"
        (image_folder / name).touch()
        records.append({"id": image_id, "file_name": name, "height": 480, "width": 640})
    for ann_id in range(1, annotations + 1):
        points = random.uniform(1, 479, 2 * int(random.integers(12, 40))).round(2).tolist()
        record = {"id": ann_id, "image_id": (ann_id - 1) % images + 1, "category_id": 1}
        drawn.append(record | {"iscrowd": 0, "bbox": points[:4], "segmentation": [points]})
    instances = {"images": records, "annotations": drawn, "categories": []}
    (folder / "instances.json").write_text(json.dumps(instances))
    num_sentences = 0
    extra = int(share * TRAINING_SENTENCES) - 2 * training
    for number in range(references):
        image_id = number % (training_images if number < training else images) + 1
        sentences = [
            {"sent_id": 3 * number + i, "sent": f"the red cup {number} on the left", "tokens": []}
            for i in range(2 + (number < extra))
        ]
        num_sentences += len(sentences) if number < training else 0
        reference = {"ref_id": number, "ann_id": image_id, "image_id": image_id}
        written.append(
            reference
            | {"split": "train" if number < training else "val", "sentences": sentences}
            | {"file_name": f"COCO_train2014_{image_id:012d}_{number}.jpg", "category_id": 1}
        )
    (folder / "refs(unc).p").write_bytes(pickle.dumps(written, protocol=2))
    return num_sentences


def measure(root: str) -> dict[str, Any]:
    """Open the training split in this process and decode some masks."""
    held_before, peak_before = _held_bytes(), peak_memory_bytes()
    start, start_cpu = time.perf_counter(), time.process_time()
    found = ReferExamples(Path(root), "refcoco", "train")
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    held, peak = _held_bytes() - held_before, peak_memory_bytes() - peak_before
    masks = []
    for position in range(0, len(found.instances), max(1, len(found.instances) // MASKS)):
        start = time.perf_counter()
        found.instances.mask(position)
        masks.append(time.perf_counter() - start)
    return {
        "sentences": len(found),
        "open_s": round(seconds, 2),
        "open_cpu_s": round(cpu_seconds, 2),
        "held_mb": round(held / 1e6),
        "peak_mb": round(peak / 1e6),
        "mask_ms": round(1e3 * statistics.median(masks), 2),
    }


def _held_bytes() -> int:
    """Return the memory that this process has allocated, without mapped files (Linux)."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def main(arguments: list[str] | None = None) -> int:
    """Generate the data set, open it in processes of their own, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="share of the size (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="processes (default: 5)")
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "data"
        write_refcoco(root, parsed.share)
        target = f"{Path(__file__).resolve()}:measure"
        rounds = [call_once(target, 300, root=str(root)) for _ in range(parsed.rounds)]
    result = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
    print(
        f"{result['sentences']:,} sentences: opened in {result['open_s']} s "
        f"({result['open_cpu_s']} s of one CPU), peak {result['peak_mb']} MB, "
        f"{result['held_mb']} MB held; {result['mask_ms']} ms per mask"
    )
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
