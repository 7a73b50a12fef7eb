"""ImageNet-1k (ILSVRC2012; arXiv 1409.0575) in the ways in which people have it.

The archives that its site gives out, which `unpack` makes a folder of:

    ILSVRC2012_img_train.tar       one tar a class, nXXXXXXXX.tar
    ILSVRC2012_img_val.tar         50,000 images, no classes
    ILSVRC2012_devkit_t12.tar.gz   the classes' names, and the class of every validation image

Or a folder (`find_unpacked`): train/CLASS/IMAGE and val/CLASS/IMAGE; or val/IMAGE beside the development kit, packed or
not; or what Kaggle gives out, ILSVRC/Data/CLS-LOC/train and val beside LOC_val_solution.csv and LOC_synset_mapping.txt.

A class folder appears when it is complete, so an interrupted unpacking goes on at the first image that is missing.
"""

import csv
import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from moco_dist.data.images import NO_CLASS, ImageFolder
from moco_dist.data.sources import find_images
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World
from moco_dist.errors import UserError, file_error, nearest

T = TypeVar("T")

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
KAGGLE_IMAGES, KAGGLE_VAL, KAGGLE_NAMES = "ILSVRC/Data/CLS-LOC", "LOC_val_solution.csv", "LOC_synset_mapping.txt"
CLASSES_FILE = "classes.json"
UNREADABLE = (OSError, tarfile.TarError, EOFError, ValueError, OverflowError, zlib.error)  # what archives raise


class Counts(NamedTuple):
    """What a whole ImageNet-1k has."""

    classes: int = 1000
    train: int = 1_281_167
    val: int = 50_000


class Labels(NamedTuple):
    """What the development kit or Kaggle's tables say.

    Attributes:
        names: WordNet id of a class to its words.
        val_classes: WordNet id of each validation image, by its file's name without suffix.
    """

    names: dict[str, str]
    val_classes: dict[str, str]


class Unpacked(NamedTuple):
    """A folder that somebody unpacked.

    Attributes:
        train: with class folders.
        val: with or without.
        val_places: CLASS/IMAGE for each path of `val`, in their order.
        names: WordNet id of a class to its words; empty where nothing says them.
    """

    train: ImageFolder
    val: ImageFolder
    val_places: Sequence[str]
    names: dict[str, str]


def find_unpacked(source: Path) -> Unpacked:
    """The images of a folder, in one of the layouts above.

    Raises:
        UserError: it has another layout, or nothing says the class of a validation image.
    """
    root = source / KAGGLE_IMAGES if (source / KAGGLE_IMAGES).is_dir() else source
    train, val = (find_images(root, split, remember=False) for split in ("train", "val"))
    labels = _labels_of(source)
    if (val.labels != NO_CLASS).all():
        return Unpacked(train, val, val.paths, labels.names if labels else {})
    if labels is None:
        devkit = f"{DEVKIT} (or {_folder_of(DEVKIT)})"
        raise UserError(f"{val.root} has images in no class folder; {source} lacks what says their classes: {devkit}, "
                        f"or Kaggle's {KAGGLE_VAL}")  # fmt: skip
    return Unpacked(train, val, [_place(path, labels, str(source)) for path in val.paths], labels.names)


def _labels_of(source: Path) -> Labels | None:
    """The labels, by what lies in a folder."""
    if (source / KAGGLE_VAL).is_file():
        return _read_kaggle(source)
    paths = (source / DEVKIT, source / _folder_of(DEVKIT))
    return next((read_devkit(path) for path in paths if path.is_file() or path.is_dir()), None)


def _folder_of(archive: str) -> str:
    return archive.removesuffix(".tar.gz")


def _place(path: str, labels: Labels, where: str) -> str:
    """CLASS/IMAGE of a validation image, from any place."""
    name = PurePosixPath(path).name
    wnid = labels.val_classes.get(PurePosixPath(name).stem)
    if wnid is None:
        raise UserError(f"{where} has a validation image {name} of no known class")
    return f"{wnid}/{name}"


def _read_kaggle(folder: Path) -> Labels:
    try:
        with (folder / KAGGLE_VAL).open(encoding="utf-8", newline="") as file:
            val = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        if isinstance(error, OSError) and error.errno:
            why = (error.strerror or "").lower()
            raise file_error(f"{folder / KAGGLE_VAL} cannot be read: {why}", error) from error
        raise UserError(f"{folder / KAGGLE_VAL} is not the table that Kaggle gives out: {error!r}") from error
    names = folder / KAGGLE_NAMES
    lines = names.read_text(encoding="utf-8").splitlines() if names.is_file() else []
    return Labels({wnid: words for wnid, _, words in (line.partition(" ") for line in lines)}, val)


def read_devkit(path: Path) -> Labels:
    """The classes, and the validation images' own, from the archive or its folder.

    Raises:
        UserError: it is damaged or another one, or scipy is missing.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(f"{path.name} is read by scipy: pip install scipy") from error
    members: dict[str, bytes] = {}
    try:
        if path.is_dir():
            members = {name: (path / "data" / name).read_bytes() for name in (GROUND_TRUTH, META)}
        else:
            with tarfile.open(path) as archive:
                named = {member: PurePosixPath(member.name).name for member in archive}
                for member in _files((member for member in named if named[member] in (GROUND_TRUTH, META)), path):
                    if file := archive.extractfile(member):
                        members[named[member]] = file.read()
        synsets = loadmat(io.BytesIO(members[META]), squeeze_me=True, struct_as_record=False)["synsets"]
        leaves = {int(s.ILSVRC2012_ID): (str(s.WNID), str(s.words)) for s in synsets if int(s.num_children) == 0}
        order = [leaves[int(number)][0] for number in members[GROUND_TRUTH].split()]
    except UserError:
        raise
    except (*UNREADABLE, KeyError) as error:
        if isinstance(error, OSError) and error.errno:
            raise file_error(f"{path} cannot be read: {(error.strerror or '').lower()}", error) from error
        raise UserError(f"{path} is damaged, or not ImageNet's development kit: {error!r}") from error
    val = {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(order, start=1)}
    return Labels(dict(leaves.values()), val)


def unpack(source: Path, partial: Path, counts: Counts) -> None:
    """PARTIAL/train/CLASS/IMAGE, PARTIAL/val/CLASS/IMAGE and PARTIAL/classes.json; goes on where it was interrupted.

    Raises:
        UserError: an archive is missing or damaged, or the number of classes or images is not ImageNet's.
    """
    here = [path.name for path in source.glob("*") if path.is_file()] if source.is_dir() else []
    for name in (TRAIN, VAL, DEVKIT):
        if name not in here:
            raise UserError(f"{source} lacks {name}{nearest(name, here)}; it is to be had from image-net.org")
    labels = read_devkit(source / DEVKIT)
    if len(labels.names) != counts.classes:
        raise UserError(f"{source / DEVKIT} has {len(labels.names)} classes instead of {counts.classes}")
    partial.mkdir(parents=True, exist_ok=True)
    _unpack_train(source / TRAIN, partial / "train", labels, counts)
    _unpack_val(source / VAL, partial / "val", labels, counts)
    write_names(labels.names, partial)


def write_names(names: dict[str, str], folder: Path) -> None:
    """FOLDER/classes.json: WordNet id of a class to its words."""
    (folder / CLASSES_FILE).write_text(json.dumps(names, indent=1), encoding="utf-8")


def _unpack_train(path: Path, out: Path, labels: Labels, counts: Counts) -> None:
    try:
        with tarfile.open(path) as archive:
            members = [member for member in _files(archive, path) if member.name.endswith(".tar")]
            if len(members) != counts.classes:
                raise UserError(f"{path} has {len(members)} classes instead of {counts.classes}")
            for member in _told(members, "unpacking train", "classes"):
                name = PurePosixPath(member.name).stem
                if name not in labels.names:
                    raise UserError(f"{path} has a class {name} that the development kit does not know")
                if (out / name).is_dir():
                    continue
                with tarfile.open(fileobj=archive.extractfile(member)) as images:
                    files = _files(images, f"{path}: {member.name}")
                    _appear(out / name, {PurePosixPath(image.name).name: image for image in files}, images)
    except UserError:
        raise
    except UNREADABLE as error:
        raise _cannot_unpack(path, error) from error
    count = sum(1 for _ in out.glob("*/*"))
    if count != counts.train:
        raise UserError(f"{path} gave {count:,} training images instead of {counts.train:,}: it is another version")


def _unpack_val(path: Path, out: Path, labels: Labels, counts: Counts) -> None:
    if out.is_dir():
        return
    if len(labels.val_classes) != counts.val:
        raise UserError(f"the development kit knows {len(labels.val_classes):,} validation images, not {counts.val:,}")
    try:
        with tarfile.open(path) as archive:
            images = _files(archive, path)
            if len(images) != counts.val:
                raise UserError(f"{path} has {len(images):,} images instead of {counts.val:,}")
            places = {_place(image.name, labels, str(path)): image for image in images}
            _appear(out, places, archive)
    except UserError:
        raise
    except UNREADABLE as error:
        raise _cannot_unpack(path, error) from error


def _told(items: Sequence[T], what: str, unit: str) -> Iterator[T]:
    with Told(what, len(items), unit, World()) as told:
        for item in items:
            yield item
            told.add()


def _cannot_unpack(path: Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.errno:  # the archive's disk, or the one that is written to
        where = f" ({error.filename})" if error.filename else ""
        return file_error(f"{path} cannot be unpacked: {(error.strerror or '').lower()}{where}", error)
    return UserError(f"{path} is damaged: {error}")


def _files(members: Iterable[tarfile.TarInfo], where: Path | str) -> list[tarfile.TarInfo]:
    """The members of an archive that are files. Folders do not matter; a link may lead to itself: it is not followed.

    Raises:
        UserError: there is a link or a device.
    """
    members = [member for member in members if not member.isdir()]
    for member in members:
        if not member.isfile():
            raise UserError(f"{where} has {member.name}, which is a link or a device, where a file is expected")
    return members


def _appear(folder: Path, places: dict[str, tarfile.TarInfo], archive: tarfile.TarFile) -> None:
    """Write files into `folder`, which is there when it is complete. Names are ours: no member chooses its path.

    Files that an interrupted call has written are kept; the one that it was writing is shorter than its member.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for place, member in _told(list(places.items()), f"unpacking {folder.name}", "images"):
        target = partial / place
        if target.is_file() and target.stat().st_size == member.size:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        file = archive.extractfile(member)
        assert file is not None  # one of `_files`
        with target.open("wb") as copy:
            shutil.copyfileobj(file, copy)
    partial.rename(folder)
