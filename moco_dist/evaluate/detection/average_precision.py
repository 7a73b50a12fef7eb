"""AP50, AP and AP75 of detections by pycocotools, as VOC 2007 counts them.

The published numbers are of detectron2's evaluator for VOC 2007: a class's AP is its mean precision at 11 recalls (0,
0.1, ... 1), and AP the mean over the IoU thresholds 0.50, 0.55, ... 0.95. COCO's own AP, at 101 recalls, is another
number. An object marked difficult is no miss when it is not found, and a detection of it counts neither way. Matching
is COCO's: a detection takes the best object that is still free, where VOC looks at the best object alone; IoU is of
areas, without VOC's pixel more along each side.
"""

import contextlib
import importlib.util
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moco_dist.errors import UserError
from moco_dist.evaluate.detection.voc import Annotated

RECALLS = 11


def require_pycocotools() -> None:
    """Refuse to begin a training that could not be scored.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError("moco-dist detect needs pycocotools: pip install 'moco_dist[detection]'")


def average_precision(
    truth: Sequence[Annotated], detections: NDArray[np.float64], num_classes: int
) -> tuple[dict[str, float], list[float | None]]:
    """How good detections are.

    Args:
        truth: the images.
        detections: (n, 7): image's number, left, top, right, bottom in pixels, score, label from 1.
        num_classes: C; labels are 1 to C.

    Returns:
        `detection_ap50`, `detection_ap`, `detection_ap75` in percent, means over the classes that have objects; and
        AP50 of each class, None where it has none.
    """
    from pycocotools import mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    class VocEval(COCOeval):
        def computeIoU(self, imgId, catId):
            """Give all objects the same IoU: in COCO a crowd, as which difficult objects are given, has another."""
            objects = self._gts[imgId, catId]  # type: ignore[attr-defined]  # set by `evaluate`
            found = sorted(self._dts[imgId, catId], key=lambda d: -d["score"])  # type: ignore[attr-defined]
            found = found[: self.params.maxDets[-1]]
            if not objects or not found:
                return []
            return mask.iou([d["bbox"] for d in found], [o["bbox"] for o in objects], [0] * len(objects))

    boxes = detections[:, 1:5].copy()
    boxes[:, 2:] -= boxes[:, :2]  # to left, top, width, height
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        coco = COCO()
        coco.dataset = _as_coco(truth, num_classes)  # type: ignore[assignment]
        coco.createIndex()
        rows = np.column_stack([detections[:, 0], boxes, detections[:, 5:]])
        found = coco.loadRes(rows) if len(rows) else COCO()  # type: ignore[arg-type]  # it cannot load none
        evaluation = VocEval(coco, found, "bbox")
        evaluation.params.imgIds = list(range(len(truth)))
        evaluation.params.catIds = list(range(1, num_classes + 1))
        evaluation.params.recThrs = np.linspace(0, 1, RECALLS)
        evaluation.params.maxDets = [100]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 0]  # (10 IoUs, 11 recalls, C), -1 where there are no objects
    has_objects = precision[0, 0] > -1
    if not has_objects.any():
        raise UserError("the test sets have no object that counts: none, or all are difficult")
    by_class = 100 * precision.mean(axis=1)  # (10, C)
    by_iou = by_class[:, has_objects].mean(axis=1)
    accuracy = {"detection_ap50": by_iou[0], "detection_ap": by_iou.mean(), "detection_ap75": by_iou[5]}
    per_class = [by_class[0, c].item() if has_objects[c] else None for c in range(num_classes)]
    return {name: float(value) for name, value in accuracy.items()}, per_class


def _as_coco(truth: Sequence[Annotated], num_classes: int) -> dict:
    """COCO's dictionary. Annotations count from 1: its matching takes 0 for none."""
    annotations = []
    for number, item in enumerate(truth):
        for box, label, difficult in zip(item.boxes.tolist(), item.labels.tolist(), item.difficult, strict=True):
            width, height = box[2] - box[0], box[3] - box[1]
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": label, "iscrowd": int(difficult),
                "bbox": [box[0], box[1], width, height], "area": width * height,
            })  # fmt: skip
    return {
        "images": [{"id": number} for number in range(len(truth))],
        "categories": [{"id": label} for label in range(1, num_classes + 1)],
        "annotations": annotations,
    }
