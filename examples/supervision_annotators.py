"""Draw a result with supervision: ``python examples/supervision_annotators.py``.

Writes ``annotated.png`` with masks, boxes and labels. Needs the extra ``supervision``.
"""

import sys

import supervision as sv
from PIL import Image

from coprs_deploy import CoPRS


def main(arguments: list[str]) -> int:
    """Print boxes and scores; write the annotated image. Arguments: IMAGE INSTRUCTION."""
    image, instruction = arguments or ("examples/scene.png", "the largest red circle")
    with CoPRS.load() as coprs:  # the demo model; CoPRS.load("bundle") loads yours
        result = coprs.segment(image, instruction)
    detections = result.to_supervision()
    labels = [
        f"{name} {score:.2f}"
        for name, score in zip(detections["class_name"], detections.confidence, strict=True)
    ]
    drawn = result.image[..., ::-1].copy()  # BGR, as OpenCV
    for annotator in (sv.MaskAnnotator(), sv.BoxAnnotator()):
        drawn = annotator.annotate(drawn, detections)
    drawn = sv.LabelAnnotator().annotate(drawn, detections, labels)
    Image.fromarray(drawn[..., ::-1]).save("annotated.png")
    print(labels, detections.xyxy.tolist())
    return 0 if len(detections) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
