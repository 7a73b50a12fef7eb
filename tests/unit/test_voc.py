"""VOC annotations as boxes, their mistakes as lines, and average precision counted by hand."""

from pathlib import Path

import numpy as np
import pytest

from moco_dist.distributed.told import Told
from moco_dist.errors import UserError
from moco_dist.evaluate.detection import voc as voc_module
from moco_dist.evaluate.detection.average_precision import average_precision
from moco_dist.evaluate.detection.voc import Annotated, Pictures, read_sets
from tests.voc import CLASSES, annotation, make_voc


@pytest.fixture
def voc(tmp_path):
    return make_voc(tmp_path / "VOC2007")


def test_reading_many_annotations_says_how_far_it_is(voc, monkeypatch):
    lines = []

    class Heard(Told):
        def __exit__(self, *error):
            lines.append(self.line().partition("  ")[0])
            super().__exit__(*error)

    monkeypatch.setattr(voc_module, "Told", Heard)
    read_sets(voc, ["trainval", "test"], CLASSES)
    assert lines == [f"reading the annotations of {name}: {count} of {count} images"
                     for name, count in (("trainval", 8), ("test", 5))]  # fmt: skip


def test_boxes_are_read(voc):
    items = read_sets(voc.parent, ["VOC2007/trainval", "VOC2007/test"], CLASSES)
    assert len(items) == 13
    first = items[0]
    assert (first.width, first.height) == (64, 48)
    assert first.boxes.tolist() == [[0, 0, 20, 24], [40, 16, 64, 48], [23, 3, 36, 14]]  # from 1, both ends in the box
    assert first.labels.tolist() == [1, 2, 1]
    assert first.difficult.tolist() == [False, False, True]
    number, picture = Pictures(items)[0]
    assert number == 0
    assert picture.shape == (3, 48, 64)
    assert picture[:, 2:20, 2:18].float().mean((1, 2)).argmax() == 0  # a box is where its colour is
    assert [item.image.stem for item in read_sets(voc, ["test"], CLASSES)] == [f"{n:06d}" for n in range(8, 13)]


DOCTYPE = '<!DOCTYPE a [<!ENTITY x "y">]><annotation><size><width>&x;</width></size></annotation>'
ONE = ("cat", (1, 1, 20, 24), False)
MISTAKES = {
    "unknown class": (annotation(64, 48, [("dgo", (1, 1, 9, 9), False)]), r"class 'dgo'.*did you mean dog\?"),
    "right of the image": (annotation(64, 48, [("cat", (1, 1, 65, 9), False)]), r"\(1, 1, 65, 9\), .*not inside"),
    "left of the image": (annotation(64, 48, [("cat", (-1, 1, 9, 9), False)]), "not inside the image"),
    "inside out": (annotation(64, 48, [("cat", (9, 1, 8, 9), False)]), "not inside the image"),
    "no number": (annotation(64, 48, [("cat", (1, 1, "nan", 9), False)]), "not inside the image"),
    "text for a number": (annotation(64, 48, [("cat", (1, 1, "x", 9), False)]), "could not convert"),
    "no box": (annotation(64, 48, [ONE]).replace("xmin", "left"), "has no <bndbox><xmin> in an <object>"),
    "no size": ("<annotation></annotation>", "has no <size><width>"),
    "half a file": (annotation(64, 48, [ONE])[:80], "is not XML"),
    "doctype": (DOCTYPE, "has a DOCTYPE"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_file(voc, case):
    text, says = MISTAKES[case]
    file = voc / "Annotations" / "000003.xml"
    file.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        read_sets(voc, ["trainval"], CLASSES)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(voc):
    with pytest.raises(UserError, match=r"set tset: .*tset\.txt does not exist; did you mean test\?"):
        read_sets(voc, ["tset"], CLASSES)
    (voc / "Annotations" / "000003.xml").unlink()
    with pytest.raises(UserError, match=r"trainval\.txt names 000003, but .*Annotations/000003\.xml does not exist"):
        read_sets(voc, ["trainval"], CLASSES)
    (voc / "JPEGImages" / "000009.jpg").unlink()
    with pytest.raises(UserError, match=r"names 000009, but .*000009\.jpg does not exist"):
        read_sets(voc, ["test"], CLASSES)


def test_an_image_of_another_size(voc):
    file = voc / "Annotations" / "000000.xml"
    file.write_text(annotation(100, 48, [ONE]))
    with pytest.raises(UserError, match=r"000000\.jpg has 64 x 48 pixels; its annotation says 100 x 48"):
        Pictures(read_sets(voc, ["trainval"], CLASSES))[0]


def image(*objects):
    """Objects are (label, box, difficult)."""
    labels, boxes, difficult = zip(*objects, strict=True)
    return Annotated(Path("x.jpg"), 100, 100, np.array(boxes, np.float32), np.array(labels), np.array(difficult))


A, B, FAR = (0, 0, 20, 20), (40, 40, 80, 80), (80, 0, 100, 20)


def ap50(truth, *found):
    """AP50 in percent of (image, box, score, label)."""
    rows = np.array([(i, *box, score, label) for i, box, score, label in found], dtype=np.float64).reshape(-1, 7)
    return average_precision(truth, rows, 2)


def test_what_is_found_and_what_is_not():
    truth = [image((1, A, False), (1, B, False)), image((2, A, False))]
    everything = ((0, A, 0.9, 1), (0, B, 0.8, 1), (1, A, 0.7, 2))
    accuracy, per_class = ap50(truth, *everything)
    assert accuracy == pytest.approx({"detection_ap50": 100, "detection_ap": 100, "detection_ap75": 100})
    assert per_class == pytest.approx([100, 100])
    # One of two: precision 1 at the recalls 0, 0.1, ... 0.5, six of VOC 2007's eleven.
    _, per_class = ap50(truth, (0, A, 0.9, 1), (1, A, 0.7, 2))
    assert per_class == pytest.approx([100 * 6 / 11, 100])
    # A wrong one before the two: precision 1/2 and 2/3 on the way, and the larger of those to come counts.
    _, per_class = ap50(truth, (0, FAR, 0.95, 1), *everything)
    assert per_class == pytest.approx([100 * 2 / 3, 100])
    assert ap50(truth)[0]["detection_ap50"] == 0


def test_iou_decides_at_each_threshold():
    truth = [image((1, (0, 0, 100, 100), False))]
    accuracy, per_class = ap50(truth, (0, (0, 0, 100, 62), 0.9, 1))  # IoU 0.62: three of the ten thresholds
    assert accuracy == pytest.approx({"detection_ap50": 100, "detection_ap": 30, "detection_ap75": 0})
    assert per_class == [pytest.approx(100), None]  # no object of class 2: left out of the means


def test_difficult_objects_count_neither_way():
    truth = [image((1, A, False), (1, B, True))]
    assert ap50(truth, (0, A, 0.5, 1))[1][0] == pytest.approx(100)  # no miss
    found_twice = ((0, B, 0.9, 1), (0, B, 0.8, 1))
    assert ap50(truth, *found_twice, (0, A, 0.5, 1))[1][0] == pytest.approx(100)  # no false alarm, however often
    inside = (40, 40, 50, 50)  # for COCO, which takes a part of a crowd for the crowd, no false alarm either
    assert ap50(truth, (0, inside, 0.9, 1), (0, A, 0.5, 1))[1][0] == pytest.approx(50)
    easy = [image((1, A, False), (1, B, False))]
    assert ap50(easy, *found_twice, (0, A, 0.5, 1))[1][0] < 100
    with pytest.raises(UserError, match="no object that counts"):
        ap50([image((1, B, True))], *found_twice)
