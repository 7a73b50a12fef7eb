"""ImageNet from archives like its own, with three classes; and what can be wrong with them."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco_dist.cli.main import main
from moco_dist.data.sources import find_images
from moco_dist.datasets import imagenet
from moco_dist.datasets.imagenet import DEVKIT, TRAIN, VAL, Counts
from moco_dist.datasets.measured import NAME, read_measured
from moco_dist.datasets.prepare import prepare_imagenet, verify
from moco_dist.errors import UserError

savemat = pytest.importorskip("scipy.io").savemat
CLASSES = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish", "n02084071": "dog"}
VAL_CLASSES = [2, 0, 1, 0, 2]  # numbers of the classes, in the order of the images
COUNTS = Counts(3, 12, 5)


def jpeg(number):
    pixels = np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = image.convert("CMYK") if number == 3 else image  # as one of ImageNet's is
    image.save(file := io.BytesIO(), "PNG" if number == 5 else "JPEG")  # and one is a PNG called .JPEG
    return file.getvalue()


def tar_of(files, mode="w"):
    with tarfile.open(fileobj=(out := io.BytesIO()), mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    number = iter(range(100))
    inner = {f"{wnid}.tar": tar_of({f"{wnid}_{i}.JPEG": jpeg(next(number)) for i in range(4)}) for wnid in CLASSES}
    (folder / TRAIN).write_bytes(tar_of(inner))
    val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(50 + i) for i in range(len(VAL_CLASSES))}
    (folder / VAL).write_bytes(tar_of(dict(reversed(val.items()))))  # in no order
    rows = [(i + 1, wnid, words, 0) for i, (wnid, words) in enumerate(CLASSES.items())]
    rows.append((4, "n00001740", "entity", 3))  # a class of classes, with no images
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    savemat(meta := io.BytesIO(), {"synsets": np.array(rows, dtype=kinds)})
    truth = "".join(f"{label + 1}\n" for label in VAL_CLASSES).encode()
    devkit = {"ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
              "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth}  # fmt: skip
    (folder / DEVKIT).write_bytes(tar_of(devkit, "w:gz"))
    return folder


def test_archives_become_folders(source, tmp_path, capsys):
    out = prepare_imagenet(tmp_path / "imagenet", source, "tars", COUNTS)
    train, val = find_images(out, "train"), find_images(out, "val")
    assert train.classes == tuple(CLASSES)
    assert np.bincount(train.labels).tolist() == [4, 4, 4]
    wnids = list(CLASSES)
    for i, label in enumerate(VAL_CLASSES):
        path = f"{wnids[label]}/ILSVRC2012_val_{i + 1:08d}.JPEG"
        assert path in val.paths
        assert (val.root / path).read_bytes() == jpeg(50 + i)
    assert json.loads((out / "classes.json").read_text()) == CLASSES
    assert "12 train + 5 val images" in capsys.readouterr().out
    prepare_imagenet(out, source, "tars", COUNTS)
    assert "already there" in capsys.readouterr().out


def test_an_interruption_goes_on_at_the_missing_class(source, tmp_path, monkeypatch):
    appear, made = imagenet._appear, []

    def interrupted(folder, places, archive):
        if len(made) == 1:
            next(iter(places.values()))
            (folder.with_name(f".{folder.name}.partial")).mkdir()
            made.append(folder.name)
            raise KeyboardInterrupt
        made.append(folder.name)
        appear(folder, places, archive)

    monkeypatch.setattr(imagenet, "_appear", interrupted)
    out = tmp_path / "imagenet"
    with pytest.raises(KeyboardInterrupt):
        prepare_imagenet(out, source, "tars", COUNTS)
    assert not out.exists()
    prepare_imagenet(out, source, "tars", COUNTS)
    assert made == ["n01440764", "n01443537", "n01443537", "n02084071", "val"]  # the first is not made again
    assert len(find_images(out, "train").paths) == 12
    assert not list(tmp_path.glob(".imagenet*"))


def test_a_folder_that_somebody_unpacked(source, tmp_path, capsys):
    unpacked = prepare_imagenet(tmp_path / "unpacked", source, "tars", COUNTS)
    out = prepare_imagenet(tmp_path / "imagenet", unpacked, "folder", COUNTS)
    assert find_images(out, "train").paths == find_images(unpacked, "train").paths
    prepare_imagenet(out, unpacked, "folder", COUNTS)
    assert "already there" in capsys.readouterr().out
    next((unpacked / "val").glob("*/*")).unlink()
    with pytest.raises(UserError, match="3 classes, 12 training and 4 validation images; ImageNet-1k has 3 classes"):
        prepare_imagenet(tmp_path / "again", unpacked, "folder", COUNTS)


VAL_NAMES = [f"ILSVRC2012_val_{i + 1:08d}" for i in range(len(VAL_CLASSES))]


@pytest.fixture
def flat(source, tmp_path):
    """FLAT/train/CLASS/IMAGE and FLAT/val/IMAGE, as the archives unpack; and what they should become."""
    unpacked = prepare_imagenet(tmp_path / "unpacked", source, "tars", COUNTS)
    (tmp_path / "flat" / "val").mkdir(parents=True)
    shutil.copytree(unpacked / "train", tmp_path / "flat" / "train")
    for path in (unpacked / "val").glob("*/*"):
        shutil.copy(path, tmp_path / "flat" / "val")
    return tmp_path / "flat", unpacked


def devkit_archive(source, flat):
    shutil.copy(source / DEVKIT, flat)
    return flat


def devkit_folder(source, flat):
    with tarfile.open(source / DEVKIT) as archive:
        archive.extractall(flat, filter="data")
    return flat


def kaggle(source, flat):
    images = flat.parent / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    images.parent.mkdir(parents=True)
    flat.rename(images)
    (images / "test").mkdir()
    wnids = list(CLASSES)
    rows = [f"{name},{wnids[label]} 1 2 3 4 {wnids[label]} 5 6 7 8 "
            for name, label in zip(VAL_NAMES, VAL_CLASSES, strict=True)]  # fmt: skip
    root = images.parents[2]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]))
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} {words}\n" for wnid, words in CLASSES.items()))
    return root


@pytest.mark.parametrize("layout", [devkit_archive, devkit_folder, kaggle])
def test_a_folder_whose_validation_images_have_no_class_folders(source, flat, tmp_path, layout):
    folder, unpacked = flat
    root = layout(source, folder)
    before = sorted(root.rglob("*"))
    out = prepare_imagenet(tmp_path / "imagenet", root, "folder", COUNTS)
    for split in ("train", "val"):
        ours, reference = find_images(out, split), find_images(unpacked, split)
        assert (ours.paths, ours.classes) == (reference.paths, reference.classes)
        assert np.array_equal(ours.labels, reference.labels)
        assert read_measured(out / split / NAME).paths == ours.paths
        for path in ours.paths:
            assert (ours.root / path).read_bytes() == (reference.root / path).read_bytes()
    assert json.loads((out / "classes.json").read_text()) == CLASSES
    assert sorted(root.rglob("*")) == before
    assert verify(out) == []


def test_what_such_a_folder_lacks_is_one_line(source, flat, tmp_path):
    folder, _ = flat
    out = tmp_path / "imagenet"
    with pytest.raises(UserError, match=f"images in no class folder; .* lacks .*{DEVKIT} .*or Kaggle's LOC_val_sol"):
        prepare_imagenet(out, folder, "folder", COUNTS)
    root = kaggle(source, folder)
    table = root / "LOC_val_solution.csv"
    whole = table.read_text()
    table.write_text(whole.replace(VAL_NAMES[2], "another"))
    with pytest.raises(UserError, match=f"has a validation image {VAL_NAMES[2]}.JPEG of no known class"):
        prepare_imagenet(out, root, "folder", COUNTS)
    table.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="LOC_val_solution.csv is not the table that Kaggle gives out"):
        prepare_imagenet(out, root, "folder", COUNTS)
    table.write_text(whole)
    broken = next(root.rglob("*_val_*.JPEG"))
    broken.write_bytes(b"")
    with pytest.raises(UserError, match=f"{broken}: the file is empty\n1 image.* prepare imagefolder leaves"):
        prepare_imagenet(out, root, "folder", COUNTS)
    assert not list(tmp_path.glob("*imagenet*"))


SLOW_COMMAND = f"""
import shutil, sys, time
from moco_dist.cli.main import main
from moco_dist.datasets import imagenet
imagenet.Counts.__new__.__defaults__ = {tuple(COUNTS)}
copy = shutil.copyfileobj
shutil.copyfileobj = lambda *files: (time.sleep(float(sys.argv[1]) * ("_val_" in files[1].name)), copy(*files))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_the_command_interrupted_among_the_validation_images_goes_on_there(source, tmp_path, signum):
    """The real command, slowed down, with the counts of these archives."""
    out = tmp_path / "imagenet"
    words = ["data", "prepare", "imagenet", "--source", str(source), "--out", str(out)]

    def command(seconds):
        return subprocess.Popen([sys.executable, "-c", SLOW_COMMAND, seconds, *words], text=True,
                                env={**os.environ, "PYTHONPATH": os.getcwd()},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def written():
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob(".imagenet.unpacked/.val.partial/*/*")
                if path.stat().st_size}  # fmt: skip

    with command("0.3") as first:
        deadline = time.monotonic() + 60
        while len(written()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        first.send_signal(signum)
        said = first.communicate()[1]
    assert first.returncode == (130 if signum == signal.SIGINT else -signal.SIGKILL), said
    assert said == ("interrupted\n" if signum == signal.SIGINT else "")
    assert not out.exists()
    kept = written()
    assert 2 <= len(kept) < len(VAL_CLASSES)
    cut = next(Path(tmp_path / ".imagenet.unpacked").glob(f".val.partial/*/{next(iter(kept))}"))
    cut.write_bytes(cut.read_bytes()[:9])  # as the image that was being written
    with command("0") as second:
        assert second.communicate()[1] == ""
    assert second.returncode == 0
    again = {path.name: path.stat().st_mtime_ns for path in (out / "val").glob("*/*")}
    assert len(again) == len(VAL_CLASSES)
    assert all(again[name] == time_ns for name, time_ns in kept.items() if name != cut.name)
    assert verify(out) == []
    assert not list(tmp_path.glob(".imagenet*"))


def damage(source, name, change):
    path = source / name
    path.write_bytes(change(path.read_bytes()))


DAMAGES = {
    "a train archive that is cut": (TRAIN, lambda b: b[: len(b) // 2], "is damaged"),
    "a development kit that is none": (DEVKIT, lambda b: b"no archive", "not ImageNet's development kit"),
    "a validation archive with one image": (VAL, lambda b: tar_of({"x.JPEG": b""}), "has 1 images instead of 5"),
    "a train archive of other classes": (TRAIN, lambda b: tar_of(dict.fromkeys(["a.tar", "b.tar", "c.tar"], b"")),
                                         "a class a that the development kit does not know"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_archive_is_one_line(source, tmp_path, name):
    archive, change, expected = DAMAGES[name]
    damage(source, archive, change)
    with pytest.raises(UserError, match=expected) as caught:
        prepare_imagenet(tmp_path / "imagenet", source, "tars", COUNTS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "imagenet").exists()


def odd_members(content, *members):
    """An archive with further members (name, type, what a link leads to)."""
    out = io.BytesIO(content)
    with tarfile.open(fileobj=out, mode="a") as archive:
        for name, kind, target in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    return out.getvalue()


def of_one_class(content, *members):
    """Archive of classes, the second of them with further members."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        inner = {member.name: archive.extractfile(member).read() for member in archive}
    return tar_of({name: odd_members(value, *members) if name == "n01443537.tar" else value
                   for name, value in inner.items()})  # fmt: skip


def test_folders_in_archives_do_not_matter(source, tmp_path):
    folder = ("n01443537", tarfile.DIRTYPE, "")
    damage(source, TRAIN, lambda content: odd_members(of_one_class(content, folder), ("x.tar", tarfile.DIRTYPE, "")))
    damage(source, VAL, lambda content: odd_members(content, ("val", tarfile.DIRTYPE, "")))
    assert verify(prepare_imagenet(tmp_path / "imagenet", source, "tars", COUNTS)) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
@pytest.mark.parametrize("place", ["class", "train", "val", "devkit"])
def test_a_link_in_an_archive_is_named_and_not_followed(source, tmp_path, place, kind):
    archive, name, change = {
        "class": (TRAIN, "a.JPEG", of_one_class),
        "train": (TRAIN, "n02084071.tar", lambda _, member: odd_members(
            tar_of({"n01440764.tar": tar_of({}), "n01443537.tar": tar_of({})}), member)),
        "val": (VAL, f"{VAL_NAMES[0]}.JPEG", lambda _, member: odd_members(
            tar_of({f"{name}.JPEG": b"" for name in VAL_NAMES[1:]}), member)),
        "devkit": (DEVKIT, "meta.mat", lambda _, member: odd_members(tar_of({}), member)),
    }[place]  # fmt: skip
    damage(source, archive, lambda content: change(content, (name, kind, name)))  # a link to itself
    with pytest.raises(UserError, match=f"{archive}.* has {name}, which is a link or a device, where a file is"):
        prepare_imagenet(tmp_path / "imagenet", source, "tars", COUNTS)
    assert not (tmp_path / "imagenet").exists()


def test_mistakes_are_one_line(source, tmp_path, capsys):
    out = str(tmp_path / "out")
    (source / TRAIN).rename(source / "ILSVRC2012_img_trian.tar")
    os.mkfifo(source / "pipe.tgz")
    cases = [
        (["imagenet", "--source", str(source), "--out", out], f"lacks {TRAIN}; did you mean ILSVRC2012_img_trian.tar?"),
        (["imagenet", "--out", out], "needs --source, the folder of its three archives"),
        (["imagenet", "--from", "tar", "--source", str(source), "--out", out], "did you mean tars?"),
        (["imagenette", "--source", str(source / "pipe.tgz"), "--out", out], "is not Imagenette's archive"),
        (["imagenette", "--source", str(source / VAL), "--out", out], "is not Imagenette's archive"),
    ]
    for words, expected in cases:
        assert main(["data", "prepare", *words]) == 2
        error = capsys.readouterr().err
        assert expected in error, error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_imagenette_from_its_archive(tmp_path):
    files = {f"imagenette2-320/{split}/{wnid}/{i}.JPEG": jpeg(i) for split in ("train", "val") for wnid in CLASSES
             for i in range(2)}  # fmt: skip
    archive = tmp_path / "imagenette2-320.tgz"
    archive.write_bytes(tar_of(files, "w:gz"))
    assert main(["data", "prepare", "imagenette", "--source", str(archive), "--out", str(tmp_path / "out")]) == 0
    assert len(find_images(tmp_path / "out", "train").paths) == 6


def test_verify(source, tmp_path, capsys):
    out = prepare_imagenet(tmp_path / "imagenet", source, "tars", COUNTS)
    capsys.readouterr()
    assert main(["data", "verify", str(out)]) == 0
    assert "12 train + 5 val images, all can be read" in capsys.readouterr().out
    broken = next((out / "train").glob("*/*"))
    broken.write_bytes(broken.read_bytes()[:100])
    next((out / "val").glob("*/*")).unlink()
    assert main(["data", "verify", str(out)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4
    assert str(broken) in errors[0]
    assert errors[1].endswith(".JPEG is missing")
    assert "val has 4 images; 5 were prepared" in errors[2]


def test_a_class_with_an_unreadable_image_is_unpacked_again(source, tmp_path):
    """As after a power cut: a class folder is there, and a file in it is empty."""
    archive = (source / VAL).read_bytes()
    damage(source, VAL, lambda content: content[:100])
    with pytest.raises(UserError, match="is damaged"):
        prepare_imagenet(tmp_path / "imagenet", source, "tars", COUNTS)
    (source / VAL).write_bytes(archive)
    emptied = next((tmp_path / ".imagenet.unpacked" / "train").glob("*/*"))
    emptied.write_bytes(b"")
    with pytest.raises(UserError, match=f"{emptied}: the file is empty\n1 image.* repeat to unpack"):
        prepare_imagenet(tmp_path / "imagenet", source, "tars", COUNTS)
    out = prepare_imagenet(tmp_path / "imagenet", source, "tars", COUNTS)
    assert verify(out) == []
    assert read_measured(out / "val" / NAME).sizes[:, 1:].tolist() == [[30, 20]] * 5
