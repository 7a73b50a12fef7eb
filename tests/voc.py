"""A small data set in the folders of PASCAL VOC: bright rectangles on noise."""

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog")
BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def annotation(width, height, objects):
    """The XML of an image; objects are (name, (xmin, ymin, xmax, ymax), difficult)."""
    texts = [
        f"<object><name>{name}</name><difficult>{int(difficult)}</difficult>{BOX.format(*box)}</object>"
        for name, box, difficult in objects
    ]
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{size}{''.join(texts)}</annotation>"


def make_voc(root, num_train=8, num_test=5):
    """ROOT with the sets trainval and test; an image has one object of each class, and one that is difficult."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, numbers in (("trainval", range(num_train)), ("test", range(num_train, num_train + num_test))):
        for number in numbers:
            width, height = 64 + 8 * (number % 3), 48
            pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
            boxes = [(1, 1, 20, 24), (width - 23, 17, width, height), (24, 4, 36, 14)]
            for channel, (left, top, right, bottom) in enumerate(boxes):
                pixels[top - 1 : bottom, left - 1 : right, channel] = 250
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{number:06d}.jpg", quality=95)
            objects = list(zip(("cat", "dog", "cat"), boxes, (False, False, True), strict=True))
            (root / "Annotations" / f"{number:06d}.xml").write_text(annotation(width, height, objects))
        lines = [f"{number:06d}\n" for number in numbers]
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(lines))
    return root
