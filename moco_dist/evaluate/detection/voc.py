"""Images with boxes in the folders of PASCAL VOC: JPEGImages, Annotations/*.xml, ImageSets/Main/*.txt."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco_dist.data.decode import decode_image
from moco_dist.data.folder import read_bytes
from moco_dist.data.images import MissingDataError
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World
from moco_dist.errors import UserError, nearest


@dataclass(frozen=True)
class Annotated:
    """An image and its objects.

    Attributes:
        image: the file.
        width, height: in pixels, by its annotation.
        boxes: float32 (n, 4): left, top, right, bottom in pixels from the corner of the image, right and bottom
            exclusive. VOC counts pixels from 1, and both ends belong to the box.
        labels: int64 (n,) from 1, the place in the list of classes; 0 is the background.
        difficult: bool (n,) objects that no detector has to find and none is blamed for.
    """

    image: Path
    width: int
    height: int
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]


def read_sets(root: Path, names: Sequence[str], classes: Sequence[str]) -> list[Annotated]:
    """The images of some sets, in the order of their lists; every annotation is read and checked.

    Args:
        root: folder that the sets' names start from.
        names: `SET`, of ROOT/ImageSets/Main/SET.txt, or `FOLDER/SET`, of ROOT/FOLDER.
        classes: names of the objects.

    Raises:
        MissingDataError: a list, an image or an annotation is missing.
        UserError: an annotation is not as it should be.
    """
    found = []
    for name in names:
        folder = root / Path(name).parent
        path = folder / "ImageSets" / "Main" / f"{Path(name).name}.txt"
        if not path.is_file():
            known = sorted(other.stem for other in path.parent.glob("*.txt"))
            raise MissingDataError(f"set {name}: {path} does not exist{nearest(Path(name).name, known)}")
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        numbers = [line.split()[0] for line in lines if line.strip()]
        if not numbers:
            raise UserError(f"set {name}: {path} names no image")
        with Told(f"reading the annotations of {name}", len(numbers), "images", World()) as told:
            for number in numbers:
                image, annotation = folder / "JPEGImages" / f"{number}.jpg", folder / "Annotations" / f"{number}.xml"
                for file in (image, annotation):
                    if not file.is_file():
                        raise MissingDataError(f"{path} names {number}, but {file} does not exist")
                found.append(read_annotation(annotation, image, classes))
                told.add()
    return found


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses a DOCTYPE: annotations need none, and by it XML can be made to grow or to read other files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("has a DOCTYPE, which an annotation does not need")


def read_annotation(path: Path, image: Path, classes: Sequence[str]) -> Annotated:
    """One file of Annotations.

    Raises:
        UserError: it is no XML, has a DOCTYPE, or an object lacks a part, is of an unknown class or not in the image.
    """
    try:
        parser = ElementTree.XMLParser(target=_NoDoctype())
        parser.feed(path.read_bytes())
        tree = parser.close()
        width, height = int(_text(tree, "size/width")), int(_text(tree, "size/height"))
        objects = [_object(item, width, height, classes) for item in tree.iterfind("object")]
    except ElementTree.ParseError as error:
        raise UserError(f"{path} is not XML: {error}") from error
    except ValueError as error:
        raise UserError(f"{path} {error}") from error
    boxes, labels, difficult = zip(*objects, strict=True) if objects else ((), (), ())
    return Annotated(
        image, width, height, np.array(boxes, dtype=np.float32).reshape(-1, 4), np.array(labels, dtype=np.int64),
        np.array(difficult, dtype=bool),
    )  # fmt: skip


def _object(
    item: ElementTree.Element, width: int, height: int, classes: Sequence[str]
) -> tuple[list[float], int, bool]:
    name = _text(item, "name")
    if name not in classes:
        raise ValueError(f"has the class {name!r}, which is not one of data.classes{nearest(name, classes)}")
    left, top, right, bottom = (float(_text(item, f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax"))
    # Programs that count from 0 write one less, so a box may begin one pixel left of or above the image.
    if not (0 <= left <= right <= width and 0 <= top <= bottom <= height and right >= 1 and bottom >= 1):
        box = f"({left:g}, {top:g}, {right:g}, {bottom:g})"
        raise ValueError(f"has a {name} with the box {box}, which is not inside the image of {width} x {height} pixels")
    corners = [max(left - 1, 0), max(top - 1, 0), right, bottom]
    return corners, classes.index(name) + 1, item.findtext("difficult") == "1"


def _text(element: ElementTree.Element, path: str) -> str:
    text = (element.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"has no <{path.replace('/', '><')}>" + (" in an <object>" if element.tag == "object" else ""))
    return text


class Pictures:
    """(number, uint8 (3, H, W)) of annotated images."""

    def __init__(self, annotated: Sequence[Annotated]) -> None:
        self.annotated = annotated

    def __len__(self) -> int:
        return len(self.annotated)

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        item = self.annotated[number]
        picture = np.array(decode_image(read_bytes(item.image), str(item.image)))
        if picture.shape[:2] != (item.height, item.width):
            sizes = f"{picture.shape[1]} x {picture.shape[0]} pixels; its annotation says {item.width} x {item.height}"
            raise UserError(f"{item.image} has {sizes}")
        return number, torch.from_numpy(picture).permute(2, 0, 1)
