"""Tar shards that people get wrong, and what the one line says of each."""

# ruff: noqa: E501 (a case is a line)

import gzip
import tarfile

from tests.tars import link, write_tar


def shards(*parts, prefix="train"):
    """A function that makes so many shards of the training images, and others of what is given."""

    def make(data, files):
        for i, part in enumerate(parts):
            write_tar(data / f"{prefix}-{i}.tar", part(files) if callable(part) else part)

    return make


def whole(files):
    return files


def sparse(files):
    """The first image as GNU tar stores files with holes."""
    info = tarfile.TarInfo("a/0.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    return [*files, info]


def harmed(change):
    """A whole shard, and then another whose bytes are changed."""

    def make(data, files):
        write_tar(data / "train-0.tar", files[:40])
        path = write_tar(data / "train-1.tar", files[40:])
        path.write_bytes(change(path.read_bytes()))

    return make


def inner(change):
    """A tar of tars, the second of which is changed."""

    def make(data, files):
        parts = [write_tar(data / "x", files[half]).read_bytes() for half in (slice(40), slice(40, None))]
        write_tar(data / "train.tar", [("a.tar", parts[0]), ("b.tar", change(parts[1]))])
        (data / "x").unlink()

    return make


def crafted_size(content):
    """The first member's size is as large as a header can say."""
    header = bytearray(content[:512])
    header[124:136] = b"\x80" + b"\xff" * 11
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]


def compressed_shards(data, files):
    (data / "train-0.tar.gz").write_bytes(gzip.compress(write_tar(data / "x", files).read_bytes(), 1))
    (data / "x").unlink()


# id: (what makes the data root, what the one line says, what follows data.root's folder)
TAR = {
    "shard cut off": (harmed(lambda c: c[: len(c) // 2]), r"train-1\.tar is no tar file, is damaged or was cut off", ""),
    "shard cut off between members": (harmed(lambda c: c[: c.rstrip(b"\0").__len__() // 512 * 512 + 512]), "without an end mark", ""),
    "shard of 0 bytes": (harmed(lambda c: b""), r"train-1\.tar is empty \(0 bytes\); was it downloaded whole\?", ""),
    "shard that is none": (harmed(lambda c: b"<html>404 not found</html>" * 50), r"train-1\.tar is no tar file", ""),
    "damaged header": (harmed(lambda c: c[:-20480].replace(b"ustar", b"xxxxx", 2) + c[-20480:]), r"train-1\.tar", ""),
    "archives put together by cat": (harmed(lambda c: c + c), "more follows its end mark .*tar -A does it right", ""),
    "compressed under the name of a plain one": (harmed(lambda c: gzip.compress(c, 1)), r"is compressed \(gz\).* rename it to train-1\.tar\.gz", ""),
    "compressed shards": (compressed_shards, r"train-0\.tar\.gz is compressed, .* moco-dist data pack .* makes a file", ""),
    "no image in them": (shards([("a/x.txt", b"text")]), r"no image found in .*; members called \.jpg", ""),
    "only links": (shards([link("a/0.jpg", "/data/0.jpg")]), "is a link to /data/0.jpg, with no image in it; tar --dereference", ""),
    "link to what is not there": (shards([link("a/0.jpg", "b/0.jpg", tarfile.LNKTYPE)]), "is a second name of b/0.jpg, which is not in it", ""),
    "sparse": (shards(sparse), "a/0.jpg in .* is sparse .*; pack the shard without --sparse", ""),
    "numbers and names": (shards([("a.jpg", b""), ("a.cls", b"3"), ("b.jpg", b""), ("b.cls", b"cat")]), "label of a.jpg is the number 3, and that of b.jpg the name 'cat'", ""),
    "label that is no JSON": (shards([("a.jpg", b""), ("a.json", b"{")]), r"a\.json in .*train-0\.tar is not JSON", ""),
    "shard twice": (shards(whole, whole), r"train-0\.tar and .*train-1\.tar have 80 images of the same names and sizes; one is a copy", ""),
    "no training shards": (shards(whole, prefix="val"), "has validation shards .*, and none with train in their names", ""),
    "shard of no split": (lambda data, files: (shards(whole)(data, files), write_tar(data / "more.tar", files)), "more.tar has neither train nor val in its name", ""),
    "pattern with a hole": (shards(whole), r"train-1\.tar is missing: 2 of the 3 shards", "/train-{0..2}.tar"),
    "pattern that is not closed": (shards(whole), r"has a \{ without its \}; a pattern is written like", "/train-{0..2.tar"),
    "pattern of nothing": (shards(whole), r"\{zero\} is neither a range .* nor a choice", "/train-{zero}.tar"),
    "pattern of compressed shards": (compressed_shards, "are compressed, so that no image", "/train-{0..1}.tar.gz"),
    "no such shard": (shards(whole), r"train-1\.tar is not a file; did you mean train-0\.tar\?", "/train-1.tar"),
    "image that is damaged": (shards(lambda files: [(name, content[:40]) for name, content in files]), r"cannot read image .*train-0\.tar", ""),
    "a tar in it that is cut off": (inner(lambda c: c[: len(c) // 2]), r"train\.tar \(b\.tar in it\) is no tar file, is damaged or was cut off", ""),
    "a tar in it that is none": (inner(lambda c: b"text" * 500), r"train\.tar \(b\.tar in it\) is no tar file", ""),
    "a pattern of nothing that is there": (shards(whole), r"more-0\.tar is missing: 3 of the 3 shards of", "/more-{0..2}.tar"),
    "a pattern that is upside down": (shards(whole), r"\{3\.\.1\} is neither a range", "/train-{3..1}.tar"),
    "a pattern of what is no tar": (shards(whole), r"train-0\.zip, which .* names, is no tar file; shards are called NAME\.tar", "/train-{0,1}.zip"),
    "a pattern of a million and more": (shards(whole), "names more than 1,000,000 shards", "/train-{0..9999999}.tar"),
    "numbers beyond classes.txt": (lambda data, files: (shards([("a.jpg", b""), ("a.cls", b"2")])(data, files), (data / "classes.txt").write_text("cat\ndog\n")), r"a\.jpg in .* is of class number 2, and classes\.txt names 0 to 1", ""),
    "classes.txt that is no text": (lambda data, files: (shards(whole)(data, files), (data / "classes.txt").write_bytes(b"\xff\xfe")), r"classes\.txt cannot be read", ""),
    "a split in a shard of another": (shards(lambda files: [(f"val/{name}", content) for name, content in files]), r"train-0\.tar is called train and has images in a folder val .*; rename the shard", ""),
    "val and validation": (lambda data, files: [write_tar(data / split / "0.tar", files) for split in ("train", "val", "validation")], "has shards in val and in validation; rename one of the two folders", ""),
    "validation shards without training": (lambda data, files: write_tar(data / "val" / "0.tar", files), r"val has tar shards, and .*train has none", ""),
    "a class that training lacks": (lambda data, files: (write_tar(data / "train.tar", files), write_tar(data / "val.tar", [("squid/0.jpg", b"")])), "squid/0.jpg: validation has a class squid that training lacks", ""),
    "a class in two Unicode forms": (shards([("caf\u00e9/0.jpg", b""), ("cafe\u0301/0.jpg", b"")]), "two classes of .* look the same", ""),
    "a shard without any member": (shards([]), r"no image found in .*; members called \.jpg", ""),
    "a shard compressed by zstd": (harmed(lambda c: b"\x28\xb5\x2f\xfd" + c), r"train-1\.tar is compressed \(zst\)", ""),
    "an image beyond the end": (harmed(lambda c: c[:512]), r"train-1\.tar is no tar file, is damaged or was cut off", ""),
    "a header of a crafted size": (harmed(crafted_size), r"train-1\.tar (is no tar file, is damaged|has a header that cannot be read)", ""),
    "with the loader of packed files": (shards(whole), "data.loader ffcv reads a packed file, and .* is one of tar shards, which torchvision reads", " --data.loader ffcv"),
    "with the loader dali": (shards(whole), "data.loader dali reads files, and .* has tar shards, which torchvision reads", " --data.loader dali"),
    "too few images": (shards(lambda files: files[:3]), "has 3 images, less than one batch", ""),
}  # fmt: skip
