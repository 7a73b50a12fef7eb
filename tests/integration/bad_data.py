"""Packed files, parquet, folders and addresses that people get wrong, and what the one line says of each."""

# ruff: noqa: E501 (a case is a line)

import json
import shutil
import struct
import unicodedata

from moco_dist.datasets.pack import pack
from tests.parquets import write_parquet


def packed(change):
    """A function that makes a packed file of the folder `data`, and changes its bytes."""

    def make(place, data):
        path = pack(data, place / "x.beton")
        path.write_bytes(change(path.read_bytes()))

    return make


def header(at, kind, value):
    """A change of one number in the header: version (0, H), fields (2, H), images (8, Q), place of the table (16, Q)."""
    return lambda content: content[:at] + struct.pack(f"<{kind}", value) + content[at + struct.calcsize(kind) :]


# id: (what makes the data root, what the one line says, what follows data.root's folder)
PACKED = {
    "cut off": (packed(lambda c: c[: len(c) // 2]), r"x\.beton is not a whole file of images and labels", "/x.beton"),
    "of 0 bytes": (packed(lambda c: b""), r"x\.beton is not a whole file", "/x.beton"),
    "a picture": (packed(lambda c: b"\x89PNG\r\n\x1a\n" + c[8:]), r"x\.beton is not a whole file .*version 20617, not 2", "/x.beton"),
    "of another version": (packed(header(0, "H", 3)), r": version 3, not 2; moco-dist data pack SOURCE OUT\.beton writes one", "/x.beton"),
    "more fields than there are": (packed(header(2, "H", 60_000)), "is not a whole file", "/x.beton"),
    "more images than it has": (packed(header(8, "Q", 2**40)), r"is not a whole file .*: it ends before its records", "/x.beton"),
    "a table beyond its end": (packed(header(16, "Q", 2**50)), "is not a whole file", "/x.beton"),
    "misspelt": (packed(bytes), r"y\.beton is not a file; did you mean x\.beton\?", "/y.beton"),
    "read by another loader": (packed(bytes), "is a packed file, which data.loader ffcv reads, not torchvision", "/x.beton "),
}  # fmt: skip


def parquet(change=bytes, name="x.parquet", **more):
    """A function that makes a parquet file of the images, and changes its bytes."""

    def make(place, images):
        labels = [0, 1] * (len(images) // 2)
        path = write_parquet(place / name, images, **{"class_names": ["cat", "dog"], "labels": labels, **more})
        path.write_bytes(change(path.read_bytes()))

    return make


def of(columns, metadata=None):
    """A function that makes a parquet file of other columns; `columns` makes them of the images."""

    def make(place, images):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns(images)).replace_schema_metadata(metadata), place / "x.parquet")

    return make


def encrypted(place, images):
    (place / "x.parquet").write_bytes(b"PARE" + bytes(100) + (80).to_bytes(4, "little") + b"PARE")


def two_schemas(place, images):
    import pyarrow as pa

    write_parquet(place / "train-0.parquet", images[:3], [0, 1, 0])
    write_parquet(place / "train-1.parquet", images[3:6], ["a", "b", "c"], kind=pa.string())


def two_lists_of_classes(place, images):
    write_parquet(place / "train-0.parquet", images[:3], [0, 1, 0], ["cat", "dog"])
    write_parquet(place / "train-1.parquet", images[3:6], [0, 1, 0], ["dog", "cat"])


def two_sets(place, images):
    for size in ("160px", "full"):
        write_parquet(place / size / "train-00000-of-00001.parquet", images[:3], [0, 1, 0], ["cat", "dog"])


def damaged_page(place, images):
    """The first image's bytes are as they were, and those of the page's header before them are not."""
    path = write_parquet(place / "x.parquet", images, [0] * len(images), ["cat", "dog"])
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 40 + content[44:])


def as_struct(images):
    return [{"bytes": data, "path": name} for data, name in images]


# id: (what makes the source of the images, what the one line says, what follows the folder)
PARQUET = {
    "cut off": (parquet(lambda c: c[: len(c) // 2]), r"x\.parquet is no parquet file, is damaged or was cut off", ""),
    "of 0 bytes": (parquet(lambda c: b""), r"x\.parquet is no parquet file.*0 bytes", ""),
    "a page of the web": (parquet(lambda c: b"<html>404</html>" * 9), r"x\.parquet is no parquet file", ""),
    "damaged in the middle": (damaged_page, r"x\.parquet is no parquet file, is damaged", ""),
    "encrypted": (encrypted, r"x\.parquet is encrypted; write it anew without encryption", ""),
    "no rows": (lambda place, images: write_parquet(place / "x.parquet", [], []), "no image found in .*: its parquet files have no rows", ""),
    "no column of images": (of(lambda images: {"url": ["http://x"], "label": [1]}), r"has no column of images, .*; it has url \(string\), label \(int64\)", ""),
    "lists of images": (of(lambda images: {"images": [as_struct(images[:2])] * 2}), "has no column of images, .*; images is a list, and one image a row", ""),
    "two columns of images": (of(lambda images: {"image": as_struct(images), "mask": as_struct(images)}), "has 2 columns of images: image, mask; --image-column names one", ""),
    "two columns of labels": (of(lambda images: {"image": as_struct(images[:1]), "fine": [1], "coarse": [0]}, {"huggingface": json.dumps({"info": {"features": {name: {"_type": "ClassLabel", "names": ["a", "b"]} for name in ("fine", "coarse")}}})}), "has 2 columns of labels: fine, coarse; --label-column names one", ""),
    "lists of labels": (of(lambda images: {"image": as_struct(images[:1]), "label": [[1, 2]]}), r"the column label of .* is list<.*; a label is a whole number or a text", ""),
    "labels that are no whole numbers": (of(lambda images: {"image": as_struct(images[:1]), "label": [0.5]}), "the column label of .* is double; a label is", ""),
    "a label without a name": (parquet(labels=[0, 1, 2, 0, 0, 0]), r"row 2 of .*x\.parquet has the label 2; 0 to 1 have names, and -1 is none", ""),
    "a negative label": (parquet(labels=[0, 1, -2, 0, 0, 0], class_names=None), r"row 2 of .*x\.parquet has the label -2; 0 is the least, and -1 is none", ""),
    "no such column": (parquet(), r"has no column lable \(--label-column\); did you mean label\?", "--label-column lable"),
    "a column that is none of images": (parquet(), "the column label of .* is int64; images are bytes", "--image-column label"),
    "columns of what is no parquet": (lambda place, images: ((place / "a").mkdir(), (place / "a" / "0.jpg").write_bytes(images[0][0])), "--image-column and --label-column are for parquet, and .* has none", "--image-column image"),
    "only nulls": (lambda place, images: write_parquet(place / "x.parquet", [None, None], [0, 0]), r"none of the 2 images of .* can be read; cannot read image row 1 of .*x\.parquet: it has no bytes", ""),
    "paths without bytes": (lambda place, images: write_parquet(place / "x.parquet", [(None, "a.jpg")], [0]), "none of the 1 images .*: it has no bytes", ""),
    "bytes that are no image": (lambda place, images: write_parquet(place / "x.parquet", [(b"text", "a.jpg")], [0]), "none of the 1 images .*: not an image", ""),
    "two schemas": (two_schemas, r"train-1\.parquet has another schema than .*train-0\.parquet: the column label is string, not int64", ""),
    "two lists of classes": (two_lists_of_classes, r"train-1\.parquet has other names of classes than .*train-0\.parquet in the column label", ""),
    "two sets": (two_sets, "has parquet files in .*160px and .*full, which are sets of their own; name one", ""),
    "a file that is missing": (parquet(name="train-00001-of-00003.parquet"), r"train-00000-of-00003\.parquet is missing: 2 of the 3 files of train", ""),
    "only test": (parquet(name="test-00000-of-00001.parquet"), r"has test files alone \(test-00000-of-00001\.parquet\)", ""),
    "only validation": (parquet(name="validation-00000-of-00001.parquet"), r"has validation shards \(validation-0.*\), and none with train", ""),
    "a class that training lacks": (lambda place, images: (write_parquet(place / "train.parquet", images[:2], [0, 1]), write_parquet(place / "val.parquet", images[:1], [5])), "validation has a class 5 that training lacks", ""),
}  # fmt: skip


def renamed(**names):
    def make(place, data):
        shutil.copytree(data, place / "set")
        for name, other in names.items():
            (place / "set" / name).rename(place / "set" / other.replace("_", "/"))

    return make


def folder(change):
    def make(place, data):
        shutil.copytree(data, place / "set")
        change(place / "set")

    return make


def two_forms(root):
    """A class whose name is written in two ways that look the same."""
    for form in ("NFC", "NFD"):
        first = next((root / "train").rglob("*.*"))
        target = root / "train" / unicodedata.normalize(form, "café") / first.name
        target.parent.mkdir()
        shutil.copy(first, target)


FOLDER = {
    "a file": (folder(lambda root: (root / "list.txt").write_text("")), r"data root .*list\.txt is not a folder", "/set/list.txt"),
    "misspelt": (folder(lambda root: None), r"data root .*sett is not a folder; did you mean set\?", "/sett"),
    "splits of other names": (renamed(train="Train", val="Validation"), "has folders Train and Validation, which would be two classes; splits are called train and val", "/set"),
    "a folder beside train": (folder(lambda root: shutil.copytree(root / "val", root / "extra")), "has images in extra beside train, which would be left out", "/set"),
    "one folder too high": (folder(lambda root: None), "has folders train and val, which would be one class, set; did you mean .*set", ""),
    "two Unicode forms of a class": (folder(two_forms), r"two classes of .* look the same", "/set"),
    "a link to above": (folder(lambda root: (root / "train" / "again").symlink_to(root)), "again is a link to .*, which it lies in; remove it", "/set"),
    "parquet": (lambda place, data: write_parquet(place / "data" / "train-00000-of-00001.parquet", [(b"x", "x.jpg")], [0], ["a"]), r"is parquet, in which reading one image means reading the row group .*; moco-dist data pack .* OUT\.beton", ""),
    "a parquet file": (lambda place, data: write_parquet(place / "x.parquet", [(b"x", "x.jpg")], [0], ["a"]), r"x\.parquet is parquet, .* moco-dist data pack .*x\.parquet OUT\.beton", "/x.parquet"),
}  # fmt: skip

# id: (the data root, where HTTP is the address of the server, what the one line says, the exit status)
REMOTE = {
    "of the hub": ("hf://datasets/timm/imagenet-1k-wds", "hf download timm/imagenet-1k-wds --repo-type dataset --local-dir FOLDER; its parquet is packed by moco-dist data pack", 2),
    "of another kind": ("ftp://host/x.tar", "addresses of data begin with s3://, gs://, az://, https://, http://", 2),
    "of another name": ("s3a://set/tars", r"did you mean s3://set/tars\?", 2),
    "one slash": ("s3:/set/tars", r"s3:/set/tars is no address; did you mean s3://set/tars\?", 2),
    "a password": ("https://me:word@host/x.tar", "has a password, a token or a .query", 2),
    "a query": ("https://host/x.tar?token=1", "has a password, a token or a .query", 2),
    "no bucket": ("s3://nothing/tars", "s3://nothing/tars cannot be read: there is no bucket s3://nothing", 2),
    "no folder": ("s3://set/trs", r"s3://set/trs: nothing lies there; did you mean tars\?", 2),
    "no shard": ("s3://set/tars/train-9.tar", r"data root s3://set/tars/train-9\.tar does not exist; did you mean train-.\.tar\?", 2),
    "a pattern with a hole": ("s3://set/tars/train-{0..2}.tar", r"train-1\.tar is missing: 1 of the 3 shards", 2),
    "stars": ("s3://set/tars/*.tar", r"\* is no pattern here; name the folder, or write \{0000\.\.1023\}", 2),
    "a folder of a web server": ("HTTP/set/tars", "a web server does not say what lies on it; name a shard", 2),
    "compressed": ("s3://set/packed", r"train-0\.tar\.gz is compressed, so that no image in it can be read alone; download it", 2),
    "images one by one": ("s3://set/images", "has no tar shards .*; images one by one are not read from an address", 2),
    "parquet": ("s3://set/parquet", r"s3://set/parquet is parquet, .*; moco-dist data pack s3://set/parquet OUT\.beton", 2),
    "a shard that is cut off": ("s3://set/cut", r"s3://set/cut/train-0\.tar is no tar file, is damaged or was cut off", 2),
    "a packed file that is none": ("s3://set/none.beton", r"s3://set/none\.beton is not a whole file of images and labels", 2),
    "no such packed file": ("s3://set/more.beton", r"s3://set/more\.beton cannot be read: there is no such object", 2),
    "a server without ranges": ("WEB/train-0.tar", r"train-0\.tar cannot be read: the server gives no parts of a file, which images are; download it", 2),
    "a server that is gone": ("http://127.0.0.1:9/train-0.tar", "cannot be read: the server does not answer", 74),
}  # fmt: skip
