"""Which images a folder holds, their classes, and what reading one says when it cannot."""

import pickle

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from moco_dist.data.decode import decode_image
from moco_dist.data.folder import read_bytes
from moco_dist.data.images import NO_CLASS, ImageError, share_of_classes, subset
from moco_dist.data.sources import find_images
from moco_dist.errors import UserError


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def test_classes_are_first_level_folders_and_paths_are_sorted(tmp_path):
    touch(tmp_path, "train/dog/b.jpg", "train/dog/a/z.PNG", "train/cat/1.webp", "train/cat/notes.txt", "train/x.jpg")
    folder = find_images(tmp_path, "train")
    assert folder.root == tmp_path / "train"
    assert folder.paths == ["cat/1.webp", "dog/a/z.PNG", "dog/b.jpg", "x.jpg"]
    assert folder.classes == ("cat", "dog")
    assert folder.labels.tolist() == [0, 1, 1, NO_CLASS]
    assert folder.labels.dtype == np.int64


def test_a_root_without_train_and_val_is_the_training_set(tmp_path):
    touch(tmp_path, "dog/b.jpg", "a.jpg")
    folder = find_images(tmp_path, "train")
    assert (folder.root, folder.paths, folder.labels.tolist()) == (tmp_path, ["a.jpg", "dog/b.jpg"], [NO_CLASS, 0])


def test_hidden_and_a_system_s_files_and_folders_are_left_out(tmp_path):
    touch(tmp_path, "dog/b.jpg", "dog/._b.jpg", ".trash/c.jpg", "dog/.thumbs/d.jpg", "lost+found/e.jpg",
          "__MACOSX/dog/b.jpg", "dog/@eaDir/b.jpg/thumb.jpg", "#recycle/f.jpg")  # fmt: skip
    folder = find_images(tmp_path, "train")
    assert (folder.paths, folder.classes) == (["dog/b.jpg"], ("dog",))


def test_val_has_the_labels_of_train_where_it_lacks_a_class(tmp_path):
    touch(tmp_path, "train/ant/1.jpg", "train/bee/1.jpg", "train/cat/1.jpg", "val/bee/1.jpg", "val/cat/1.jpg")
    folder = find_images(tmp_path, "val")
    assert folder.classes == ("ant", "bee", "cat")
    assert folder.labels.tolist() == [1, 2]


def test_linked_images_and_folders_are_found(tmp_path):
    touch(tmp_path, "elsewhere/a.jpg")
    (tmp_path / "set" / "dog").mkdir(parents=True)
    (tmp_path / "set" / "dog" / "link.jpg").symlink_to(tmp_path / "elsewhere" / "a.jpg")
    (tmp_path / "set" / "fox").symlink_to(tmp_path / "elsewhere")
    assert find_images(tmp_path / "set", "train").paths == ["dog/link.jpg", "fox/a.jpg"]


@pytest.mark.parametrize(
    ("files", "root", "split", "message"),
    [
        (["imagenet/train/a/1.jpg"], "imagenett", "train", "imagenett is not a folder; did you mean imagenet?"),
        (["set/a/1.txt"], "set", "train", "no image found in .*set; .*jpg"),
        (["set/a/1.jpg"], "set", "val", "no validation set; .*val/CLASS/IMAGE"),
        (["set/val/a/1.jpg", "set/trian/a/1.jpg"], "set", "train", "none called train; did you mean trian?"),
        (["set/val/1.jpg", "set/hill/1.jpg"], "set", "train", "if val is a class like hill, lay out .*set/train/val"),
        (["set/train/cat/1.jpg", "set/val/cart/1.jpg"], "set", "val", "class cart that .* lacks; did you mean cat?"),
        (
            [f"set/{name}/1.jpg" for name in ("bicycle", "bus", "car", "train")],
            "set",
            "train",
            "images in bicycle, bus, car beside train, which .* if train is a class like them, lay out .*train/train,",
        ),
        ([f"set/{name}/a/1.jpg" for name in ("train", "val", "more")], "set", "val", "images in more beside train"),
        ([f"set/{name}/a/1.jpg" for name in ("train", "validation")], "set", "train", "mean that by validation?"),
        ([f"set/{name}/a/1.jpg" for name in ("train", "Val")], "set", "val", "mean that by Val?"),
        ([f"set/{name}/a/1.jpg" for name in ("Train", "Val")], "set", "train", "folders Train and Val, .* two classes"),
        ([f"set/{name}/a/1.jpg" for name in ("training", "validation")], "set", "train", "training and validation,"),
        ([f"set/{name}/a/1.jpg" for name in ("seg_test", "seg_train")], "set", "train", "seg_test and seg_train, "),
        ([f"set/{name}/a/1.jpg" for name in ("train2017", "val2017")], "set", "val", "train2017 and val2017, "),
        (
            [f"set/archive/{name}/a/1.jpg" for name in ("train", "val")],
            "set",
            "train",
            "set/archive has folders train and val, which would be one class, archive; did you mean .*set/archive",
        ),
        (
            [f"sets/{name}/a/1.jpg" for name in ("x/Train", "x/Test", "y")],
            "sets",
            "train",
            "sets/x has folders Test an",
        ),
        (["set/Training/a/1.jpg"], "set", "train", "one folder, Training, .* did you mean .*set/Training?"),
        (["set/training/a/1.jpg", "set/val/a/1.jpg"], "set", "train", "none called train; did you mean training?"),
        (
            ["set/train/caf\u00e9/1.jpg", "set/val/cafe\u0301/1.jpg"],
            "set",
            "val",
            r"class .* lacks; 'caf\\xe9', which is there, looks the same as 'cafe\\u0301'",
        ),
        (
            ["set/train/bus/1.jpg", "set/val/bus /1.jpg"],
            "set",
            "val",
            "'bus', which is there, looks the same as 'bus '",
        ),
        (
            ["set/train/bus/1.jpg", "set/val/b\u03c5s/1.jpg"],
            "set",
            "val",
            r"did you mean 'bus'\? 'b\\u03c5s' has letters of another script",
        ),
        (
            ["set/caf\u00e9/1.jpg", "set/cafe\u0301/1.jpg"],
            "set",
            "train",
            r"look the same: 'cafe\\u0301' and 'caf\\xe9'",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, files, root, split, message):
    touch(tmp_path, *files)
    with pytest.raises(UserError, match=message):
        find_images(tmp_path / root, split)


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        (["train/a/1.jpg", "val/a/1.jpg", "test/1.jpg", "devkit/data/truth.txt", "Annotations/a/1.xml"], ("a",)),
        (["train/a/1.jpg", "Test/1.jpg", "lost+found/1.jpg", "runs/log.jsonl", "runs/x.pt", "runs/r.png"], ("a",)),
        (["train/train/1.jpg", "train/bus/1.jpg"], ("bus", "train")),
        (["bus/1.jpg", "Train/1.jpg"], ("Train", "bus")),
        (["steam train/1.jpg", "test tube/1.jpg", "valley/1.jpg"], ("steam train", "test tube", "valley")),
        (["bus/train/1.jpg", "tram/near/1.jpg"], ("bus", "tram")),
        (["training shoe/1.jpg", "sandal/1.jpg"], ("sandal", "training shoe")),
    ],
)
def test_usual_layouts_are_read_as_they_are_meant(tmp_path, files, classes):
    assert find_images(touch(tmp_path, *files), "train").classes == classes


def test_subset_is_spread_over_all_classes(tmp_path):
    touch(tmp_path, *(f"{c}/{i:02d}.jpg" for c in "abcd" for i in range(25)))
    folder = find_images(tmp_path, "train")
    part = subset(folder, 12)
    assert np.bincount(part.labels).tolist() == [3, 3, 3, 3]
    assert len(set(part.paths)) == 12
    assert [path[0] for path in part.paths] == [part.classes[label] for label in part.labels]
    assert subset(folder, None) is folder
    assert subset(folder, 1000) is folder


def test_a_share_of_the_classes_is_a_function_of_its_seed():
    labels = np.repeat(np.arange(4), 25)
    one, again, other = (share_of_classes(labels, 0.2, [seed, 0]) for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert np.bincount(labels[one]).tolist() == [5, 5, 5, 5]


def read_image(path):
    return decode_image(read_bytes(path), str(path))


@pytest.fixture
def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["L", "1", "RGBA", "CMYK", "P"])
def test_every_mode_becomes_rgb(tmp_path, noise, mode):
    path = tmp_path / "x.tif"
    noise.convert(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(noise.convert(mode).convert("RGB")))


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp"])
def test_truncated_files_are_named(tmp_path, noise, suffix):
    path = tmp_path / f"x.{suffix}"
    noise.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=rf"cannot read image .*x\.{suffix}: \w+"):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no such file"), (b"", "the file is empty"), (b"<html>404</html>", "not an image")],
)
def test_missing_empty_and_other_files_are_named(tmp_path, content, reason):
    path = tmp_path / "x.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"x\.jpg: {reason}"):
        read_image(path)


def test_a_folder_called_like_an_image_is_named(tmp_path):
    (tmp_path / "x.jpg").mkdir()
    with pytest.raises(ImageError, match=r"x\.jpg: is a directory"):
        read_image(tmp_path / "x.jpg")


def test_a_decompression_bomb_is_refused(tmp_path, noise, monkeypatch):
    noise.save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"x\.png: .*decompression bomb"):
        read_image(tmp_path / "x.png")


def test_any_error_of_a_decoder_is_the_image_s(tmp_path, noise, monkeypatch):
    def broken(*args):
        raise IndexError("tuple index out of range")

    noise.save(tmp_path / "x.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", broken)
    with pytest.raises(ImageError, match=r"x\.png: tuple index out of range"):
        read_image(tmp_path / "x.png")


def test_an_image_error_survives_the_way_out_of_a_worker_process():
    error = pickle.loads(pickle.dumps(ImageError("cannot read image x.jpg: empty")))
    assert isinstance(error, ImageError)
    assert str(error) == "cannot read image x.jpg: empty"


def test_a_share_of_a_class_is_rounded_up():
    labels = np.repeat([0, 1, 2], [1, 3, 21])
    assert np.bincount(labels[share_of_classes(labels, 0.1, [0])]).tolist() == [1, 1, 3]
