"""ImageNet-1k from the archives that its site gives out (ILSVRC2012; arXiv 1409.0575).

    ILSVRC2012_img_train.tar       one tar a class, nXXXXXXXX.tar
    ILSVRC2012_img_val.tar         50,000 images, no classes
    ILSVRC2012_devkit_t12.tar.gz   the classes' names, and the class of every validation image

A class folder appears when it is complete, so an interrupted preparation goes on at the first class that is missing.
"""

import io
import json
import shutil
import tarfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from moco_dist.errors import UserError, nearest

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
CLASSES_FILE = "classes.json"


class Sizes(NamedTuple):
    """What a whole ImageNet-1k has."""

    classes: int = 1000
    train: int = 1_281_167
    val: int = 50_000


class Devkit(NamedTuple):
    """What the development kit says.

    Attributes:
        names: WordNet id of a class to its words.
        val_classes: WordNet id of each validation image, in the order of their numbers.
    """

    names: dict[str, str]
    val_classes: list[str]


def read_devkit(path: Path) -> Devkit:
    """The classes, and the validation images' own.

    Raises:
        UserError: the archive is damaged or another one, or scipy is missing.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(f"{path.name} is read by scipy: pip install scipy") from error
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name in (GROUND_TRUTH, META) and (file := archive.extractfile(member)):
                    members[name] = file.read()
        synsets = loadmat(io.BytesIO(members[META]), squeeze_me=True, struct_as_record=False)["synsets"]
        leaves = {int(s.ILSVRC2012_ID): (str(s.WNID), str(s.words)) for s in synsets if int(s.num_children) == 0}
        order = [leaves[int(number)][0] for number in members[GROUND_TRUTH].split()]
    except (OSError, tarfile.TarError, KeyError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged, or not ImageNet's development kit: {error!r}") from error
    return Devkit(dict(leaves.values()), order)


def unpack(source: Path, partial: Path, sizes: Sizes) -> None:
    """PARTIAL/train/CLASS/IMAGE, PARTIAL/val/CLASS/IMAGE and PARTIAL/classes.json; goes on where it was interrupted.

    Raises:
        UserError: an archive is missing or damaged, or the number of classes or images is not ImageNet's.
    """
    here = [path.name for path in source.glob("*")] if source.is_dir() else []
    for name in (TRAIN, VAL, DEVKIT):
        if name not in here:
            raise UserError(f"{source} lacks {name}{nearest(name, here)}; it is to be had from image-net.org")
    devkit = read_devkit(source / DEVKIT)
    if len(devkit.names) != sizes.classes:
        raise UserError(f"{source / DEVKIT} has {len(devkit.names)} classes instead of {sizes.classes}")
    partial.mkdir(parents=True, exist_ok=True)
    _unpack_train(source / TRAIN, partial / "train", devkit, sizes)
    _unpack_val(source / VAL, partial / "val", devkit, sizes)
    (partial / CLASSES_FILE).write_text(json.dumps(devkit.names, indent=1), encoding="utf-8")


def _unpack_train(path: Path, out: Path, devkit: Devkit, sizes: Sizes) -> None:
    try:
        with tarfile.open(path) as archive:
            members = [member for member in archive if member.name.endswith(".tar")]
            if len(members) != sizes.classes:
                raise UserError(f"{path} has {len(members)} classes instead of {sizes.classes}")
            for member in tqdm(members, desc="unpacking train", unit="classes", disable=None):
                name = PurePosixPath(member.name).stem
                if name not in devkit.names:
                    raise UserError(f"{path} has a class {name} that the development kit does not know")
                if (out / name).is_dir():
                    continue
                file = archive.extractfile(member)
                assert file is not None  # a plain file
                with tarfile.open(fileobj=file) as images:
                    _appear(out / name, {PurePosixPath(image.name).name: image for image in images}, images)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} is damaged, or the disk is full: {error}") from error
    count = sum(1 for _ in out.glob("*/*"))
    if count != sizes.train:
        raise UserError(f"{path} gave {count:,} training images instead of {sizes.train:,}: it is another version")


def _unpack_val(path: Path, out: Path, devkit: Devkit, sizes: Sizes) -> None:
    if out.is_dir():
        return
    if len(devkit.val_classes) != sizes.val:
        raise UserError(f"the development kit knows {len(devkit.val_classes):,} validation images, not {sizes.val:,}")
    try:
        with tarfile.open(path) as archive:
            images = sorted((image for image in archive if image.isfile()), key=lambda image: image.name)
            if len(images) != sizes.val:
                raise UserError(f"{path} has {len(images):,} images instead of {sizes.val:,}")
            places = {
                f"{name}/{PurePosixPath(image.name).name}": image
                for name, image in zip(devkit.val_classes, images, strict=True)
            }
            _appear(out, places, archive)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} is damaged, or the disk is full: {error}") from error


def _appear(folder: Path, places: dict[str, tarfile.TarInfo], archive: tarfile.TarFile) -> None:
    """Write files into `folder`, which is there when it is complete. Names are ours: no member chooses its path."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for place, member in tqdm(places.items(), desc=folder.name, unit="images", disable=None, leave=False):
        target = partial / place
        target.parent.mkdir(parents=True, exist_ok=True)
        file = archive.extractfile(member)
        assert file is not None
        with target.open("wb") as copy:
            shutil.copyfileobj(file, copy)
    partial.rename(folder)
