"""Small files of others, or damaged ones: never a traceback, and no memory for what they only claim to have."""

import gzip
import io
import json
import resource

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from moco_dist.cli.main import main
from moco_dist.data.images import ImageFolder
from moco_dist.data.mapped import MAGIC
from moco_dist.data.names import Names
from moco_dist.data.storage import PlacedFile
from moco_dist.data.tar import index
from moco_dist.data.tar.listing import Listed, Lists
from moco_dist.datasets.measured import NAME as SIZES
from moco_dist.datasets.prepare import MARKER, prepare_shapes, verify
from moco_dist.errors import LONGEST_LINE, UserError
from moco_dist.files import parsed_json
from moco_dist.run.folder import RunFolder
from moco_dist.run.image_list import difference, keep_list, listed
from moco_dist.run.logbook import read_log
from moco_dist.run.results import nearest_examples
from moco_dist.run.weights import imported_from
from moco_dist.tracking.server import read_saved

DEEP = "[" * 100_000


def test_json_that_is_nested_deeply_is_none(tmp_path):
    with pytest.raises(ValueError, match="nested too deeply"):
        parsed_json(DEEP)
    (tmp_path / "mlflow.json").write_text(DEEP)
    with pytest.raises(UserError, match=r"mlflow\.json is damaged"):
        read_saved(tmp_path / "mlflow.json")


@pytest.mark.parametrize("text", [DEEP, '{"labels": [["a.png", 3]]}', '{"images": [1]}', '{"images": {"train": "x"}}'])
def test_a_dataset_json_of_another_program_is_no_word_about_the_images(tmp_path, text):
    """StyleGAN's has that name."""
    root = prepare_shapes(tmp_path / "s", num_train=10, num_val=10)
    (root / MARKER).write_text(text)
    assert verify(root) == []
    with pytest.raises(UserError, match="exists and is not a prepared data set"):
        prepare_shapes(root)


@pytest.mark.parametrize("harm", ["shape", "deflated"])
def test_sizes_of_images_that_are_crafted_are_made_anew(tmp_path, harm):
    root = prepare_shapes(tmp_path / "s", num_train=10, num_val=10)
    path = root / "train" / SIZES
    assert verify(root) == []
    with np.load(path) as whole:
        arrays = dict(whole)
    if harm == "shape":  # of 8 TB
        np.savez(content := io.BytesIO(), **arrays)
        path.write_bytes(content.getvalue().replace(b"(10, 3), }" + b" " * 9, b"(999999999999, 3), }"))
    else:
        np.savez_compressed(content := io.BytesIO(), paths=np.random.default_rng(0).bytes(9_000), sizes=arrays["sizes"])
        damaged = bytearray(content.getvalue())
        damaged[100:120] = bytes(20)
        path.write_bytes(damaged)
    assert verify(root) == []


def lists_of(**changes):
    """The index of three images in one of two shards, one number of which is another."""
    columns = {
        "content": np.frombuffer(b"a/1.jpg\na/2.jpg\na/3.jpg", np.uint8), "ends": np.array([7, 15, 23]),
        "shard": np.zeros(3, np.int32), "offset": np.array([512, 1536, 2560]), "size": np.array([9, 9, 9]),
        "label": np.zeros(3, np.int64), **changes,
    }  # fmt: skip
    return Lists(["a"], {"train": Listed(**columns)}, {"train": "hash"})


@pytest.mark.parametrize(
    "changes",
    [{"label": np.array([0, 1, 0])}, {"label": np.array([0, -2, 0])}, {"shard": np.array([0, 2, 0], np.int32)},
     {"ends": np.array([7, 15, 24])}, {"ends": np.array([15, 7, 23])}, {"ends": np.array([-1, 15, 23])},
     {"label": np.zeros(3)}, {"offset": np.zeros(3)}, {"content": np.zeros(23, np.int8)}, {"size": np.zeros(2, int)}],
)  # fmt: skip
def test_an_index_of_shards_with_numbers_that_cannot_be_is_not_believed(tmp_path, changes):
    asked, path = json.dumps({"shards": [1, 2]}), tmp_path / "x.idx"
    path.write_bytes(b"".join(index.index_content(lists_of(), asked)))
    assert index.read_index(path) is not None
    path.write_bytes(b"".join(index.index_content(lists_of(**changes), asked)))
    assert index.read_index(path) is None


@pytest.mark.parametrize(
    "facts",
    [DEEP, "3", "[]", "{}", '{"arrays": 3}', '{"arrays": {"train.label": ["<i8", 9223372036854775807]}}',
     '{"arrays": {"train.label": ["<i8", -4]}}', '{"arrays": {"train.label": ["O", 1]}}',
     '{"arrays": {}, "asked": "{}", "lists": {"classes": [], "splits": {}, "content_hashes": {}}}'],
)  # fmt: skip
def test_an_index_whose_first_line_is_crafted_is_not_believed(tmp_path, facts):
    (tmp_path / "x.idx").write_bytes(MAGIC + facts.encode() + b"\n" + bytes(64))
    assert index.read_index(tmp_path / "x.idx") is None


def test_a_place_beyond_the_end_of_a_file_takes_no_memory(tmp_path):
    (tmp_path / "x.tar").write_bytes(bytes(1000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for start, size in ((0, 2**40), (990, 11), (2**40, 1), (0, -1)):
        with pytest.raises(OSError, match="the file ends before it"):
            PlacedFile(tmp_path / "x.tar").read(start, size)
    assert PlacedFile(tmp_path / "x.tar").read(990, 10) == bytes(10)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # kilobytes


def test_a_damaged_list_of_images_is_as_good_as_none(tmp_path):
    """In the midst of what is compressed, where zlib has an error of its own."""
    names = Names.of([f"{np.random.default_rng(i).integers(2**60)}.jpg" for i in range(99)])
    images = ImageFolder(tmp_path, names, np.zeros(99, np.int64), ())
    keep_list(images, RunFolder(tmp_path))
    path = RunFolder(tmp_path).images(images.list_hash)
    content = bytearray(path.read_bytes())
    content[60:90] = b"\xff" * 30
    path.write_bytes(content)
    fewer = ImageFolder(tmp_path, names[:98], np.zeros(98, np.int64), ())
    assert difference(fewer, listed(images), RunFolder(tmp_path)) == "99 images before, 98 now"


def test_a_shard_whose_compression_is_damaged_is_named(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    content = bytearray(gzip.compress(np.random.default_rng(0).integers(0, 9, 20_000, dtype=np.uint8).tobytes()))
    content[900:930] = b"\xff" * 30
    (tmp_path / "set" / "train-0.tar.gz").write_bytes(content)
    assert main(["data", "pack", str(tmp_path / "set"), str(tmp_path / "x.beton")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train-0.tar.gz cannot be decompressed: " in line
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_lines_of_a_log_that_are_no_numbers_are_left_out(tmp_path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": "x"}, {"step": 3, "loss": [1]}, {"step": 4, "lr": None}]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert read_log(tmp_path) == rows[:1]


@pytest.mark.parametrize(
    "rows", [[{}], [3], [{"query": 1, "query_label": "", "neighbours": [], "neighbour_labels": []}]]
)
def test_neighbours_that_are_crafted_are_named(tmp_path, rows):
    (tmp_path / "eval").mkdir()
    RunFolder(tmp_path).neighbours.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"neighbours\.json is damaged: 0.*; remove it, and run moco-dist knn again"):
        nearest_examples(tmp_path, tmp_path, tmp_path)


def test_weights_without_a_word_about_them_were_not_imported(tmp_path):
    safetensors.torch.save_file({"x": torch.zeros(1)}, RunFolder(tmp_path).backbone)
    assert imported_from(tmp_path) == ""


def test_names_in_others_files_neither_move_the_cursor_nor_fill_the_screen(tmp_path, capsys):
    weights = {f"layer9.\x1b[2J\u202e{'x' * 50_000}": torch.zeros(1)}
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    assert main(["import", str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "run")]) == 2
    root = tmp_path / "set" / "train" / "a"
    root.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(root / "good.jpg")
    (root / "\x1b]0;title\x07.jpg").write_bytes(b"no image")
    (root / "\udcff\udcfe.jpg").write_bytes(b"no image")
    assert main(["data", "verify", str(tmp_path / "set")]) == 2
    error = capsys.readouterr().err
    assert max(map(len, error.splitlines())) < LONGEST_LINE + 20
    assert all(letter.isprintable() or letter == "\n" for letter in error)
    assert "\\x1b]0;title\\x07.jpg: not an image" in error
    assert "\\udcff\\udcfe.jpg: not an image" in error
