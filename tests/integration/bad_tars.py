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
    "too few images": (shards(lambda files: files[:3]), "has 3 images, less than one batch", ""),
}  # fmt: skip
