"""Packed files whose numbers are wrong: sizes are checked before anything is allocated, and `data.on_error` decides."""

import resource

import numpy as np
import pytest
from PIL import Image

from moco_dist.cli.main import main
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data import beton
from moco_dist.data.beton import JPEG, RAW
from moco_dist.data.images import ImageError
from moco_dist.data.loaders import pretrain_batches
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_images
from moco_dist.datasets.pack import pack
from moco_dist.distributed.world import World
from moco_dist.errors import UserError

BAD = "train/ant/1.jpg"


@pytest.fixture(params=[0.0, 1.0], ids=["JPEG", "RAW"])
def packed(request, tmp_path):
    """A file of eight images, all of them stored in one way."""
    for i in range(8):
        (tmp_path / "set/train/ant").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"set/train/ant/{i}.jpg")
    return pack(tmp_path / "set", tmp_path / "x.beton", raw_share=request.param)


def craft(path, **changes):
    """Write other numbers into the header, or into the records and the table's line of the image BAD."""
    content = bytearray(path.read_bytes())
    header = np.frombuffer(content, beton._HEADER, 1)
    record = np.dtype([("", beton._RECORDS[kind]) for kind in beton._OUR_FIELDS.values()], align=True)
    records_at = beton._HEADER.itemsize + 3 * beton._FIELD.itemsize
    records = np.frombuffer(content, record, 8, records_at)
    table = np.frombuffer(content, beton._TABLE, 16, int(header["table_at"][0]))
    for name, value in changes.items():
        place, _, key = name.partition("_")
        lines = {"header": header, "image": records["f0"][1:2], "table": table[1:2], "name": records["f2"][1:2]}
        lines[place][key] = value
    path.write_bytes(content)


def batches_of(path, on_error="fail", num_workers=0):
    config = PretrainConfig.model_validate({
        "run": {"dir": "unused"}, "model": {"bn_group_size": 2}, "optim": {"global_batch_size": 8},
        "data": {"root": path, "loader": "ffcv", "image_size": 24, "num_workers": num_workers, "on_error": on_error},
    })  # fmt: skip
    return list(pretrain_batches(find_images(path, "train"), config, Plan(8, 8, 0), World(), 0, 1))


CRAFTED = {
    "larger than the file": ({"table_size": 2**40}, "the file has no such place"),
    "larger than a number": ({"table_size": 2**64 - 1}, "the file has no such place"),
    "of no bytes": ({"table_size": 0}, "the file has no such place"),
    "at no place": ({"image_at": 2**50}, "the file has no such place"),
    "in an unknown way": ({"image_mode": 7}, r"it is stored in an unknown way \(7\)"),
}
CRAFTED_RAW = {
    "of other sides": ({"image_width": 65_535}, "3,600 bytes are not the pixels of 65535 x 30"),
    "of no width": ({"image_width": 0}, "3,600 bytes are not the pixels of 0 x 30"),
    "said to be a JPEG": ({"image_mode": JPEG}, "not an image"),
}
CRAFTED_JPEG = {"said to be pixels": ({"image_mode": RAW}, "bytes are not the pixels of 40 x 30")}


@pytest.mark.parametrize(
    ("packed", "case"),
    [(0.0, case) for case in CRAFTED | CRAFTED_JPEG] + [(1.0, case) for case in CRAFTED | CRAFTED_RAW],
    indirect=["packed"],
)
def test_an_image_of_wrong_numbers_is_named_and_for_on_error(packed, case, capsys):
    changes, reason = (CRAFTED | CRAFTED_JPEG | CRAFTED_RAW)[case]
    craft(packed, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match=f"^cannot read image {packed}/{BAD}: .*{reason}$"):
        batches_of(packed)
    (batch,) = batches_of(packed, "skip-and-report", num_workers=1)
    assert len(batch.replaced) == 1
    capsys.readouterr()
    assert main(["data", "verify", str(packed)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and BAD in lines[0] and lines[1].endswith("has 1 problem(s)")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # kilobytes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"header_num_samples": 2**40}, "ends before its records"), ({"header_num_samples": 9_000_000}, "ends before"),
     ({"header_table_at": 2**60}, "ends before its table"), ({"header_num_fields": 60_000}, "ends before its fields"),
     ({"name_size": 2**40}, "names"), ({"name_size": 2**64 - 1}, "names"), ({"header_num_fields": 0}, "fields are")],
)  # fmt: skip
def test_a_file_of_wrong_numbers_is_refused_before_it_is_read(packed, changes, reason):
    craft(packed, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=f"is not a whole file of images and labels.*{reason}"):
        find_images(packed, "train")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18


def test_a_whole_file_is_verified(packed, capsys):
    capsys.readouterr()
    assert main(["data", "verify", str(packed)]) == 0
    assert capsys.readouterr().out == f"{packed}: 8 train images, all can be read\n"
