"""Record polygons as OpenCV draws them, for the test of ``polygon_fill``; needs OpenCV.

python -m tests.unit.data.readers.record_polygons
"""

import numpy as np

from tests import ROOT

RECORDED = ROOT / "tests/golden/opencv_polygons.npz"
NUM_POLYGONS = 400


def read():
    """Yield points and mask of each recorded polygon."""
    with np.load(RECORDED) as recorded:
        sizes, counts, points = recorded["sizes"], recorded["counts"], recorded["points"]
        pixels = np.unpackbits(recorded["pixels"]).astype(bool)
    for (height, width), count in zip(sizes.tolist(), counts.tolist(), strict=True):
        mask, pixels = pixels[: height * width], pixels[height * width :]
        yield points[:count].tolist(), mask.reshape(height, width)
        points = points[count:]


def main():
    """Draw random polygons, part of them beyond the image, as LISA does."""
    import cv2

    random = np.random.default_rng(0)
    sizes, points, masks = [], [], []
    for _ in range(NUM_POLYGONS):
        height, width = random.integers(1, 50, 2).tolist()
        margin = int(random.choice([0, 2, 10, 60, 400]))
        low, high = (-margin, -margin), (width - 1 + margin, height - 1 + margin)
        polygon = random.uniform(low, high, (random.integers(1, 12), 2)).round(3)
        mask = np.zeros((height, width), np.uint8)
        cv2.polylines(mask, polygon.astype(np.int32)[None], True, 1, 1)
        cv2.fillPoly(mask, polygon.astype(np.int32)[None], 1)
        sizes.append(mask.shape)
        points.append(polygon)
        masks.append(mask.ravel())
    np.savez_compressed(
        RECORDED,
        version=np.array(cv2.__version__),
        sizes=np.array(sizes),
        counts=np.array([len(each) for each in points]),
        points=np.concatenate(points),
        pixels=np.packbits(np.concatenate(masks)),
    )


if __name__ == "__main__":
    main()
