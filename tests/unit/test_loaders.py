"""The three loaders: the same views from the same seed, whatever happens to be in a file."""

import gc
import multiprocessing
import os
import pickle
import resource

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from moco_dist.config.evaluate import EvalDataConfig
from moco_dist.data.beton import read_beton
from moco_dist.data.images import ImageError
from moco_dist.data.loaders import eval_batches, pretrain_batches
from moco_dist.data.packed import PackedFile
from moco_dist.data.plan import Plan
from moco_dist.data.sources import find_images
from moco_dist.data.tasks import view_task
from moco_dist.data.workers import Files
from moco_dist.datasets.pack import pack
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from tests.unit.loaders import (
    BATCH,
    SIZE,
    assert_same,
    batches_of,
    config_of,
    damaged,
    picture,
    sizes_known_already,
    undamaged,
)  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """ROOT/train and ROOT/val: 24 JPEGs of different sizes, smooth with some noise, as photographs are."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(24):
        path = root / ("val" if i % 4 == 3 else "train") / f"class_{i % 3}" / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, 100 + 3 * i, 150 - 2 * i).save(path, quality=92)
    return root


@pytest.fixture
def root_for(tmp_path):
    """The data root to give to a loader for a folder: for ffcv, the packed file."""

    def root(loader, folder):
        if loader != "ffcv":
            return folder
        packed = tmp_path / f"{folder.name}.beton"
        return packed if packed.exists() else pack(folder, packed)

    return root


def rank_of(world_size):
    return [World(rank=r, local_rank=r % 2, world_size=world_size, local_world_size=2) for r in range(world_size)]


def test_all_loaders_give_the_reference_s_views(photos, loader, root_for):
    """FFCV bit for bit; DALI within 0.3 levels on average and 16 at most: it decodes regions and rounds differently."""
    reference = batches_of(config_of(photos, "torchvision"), 5, 8)
    ours = batches_of(config_of(root_for(loader, photos), loader), 5, 8)
    assert_same(ours, reference, *((0.3, 16) if loader == "dali" else (0, 0)))


def test_boxes_do_not_depend_on_the_loader_or_on_who_decodes(photos):
    """A task's crops are a function of step, sample and size: the same for one rank and for each of four."""
    config = config_of(photos, "torchvision")
    plan = Plan(18, BATCH, 0)

    def crops(world):
        task = view_task(3, config, plan, world)
        n = len(plan.query_indices(3, world))
        sample_of = dict(enumerate([*plan.query_indices(3, world), *plan.key_indices(3, world)]))
        return {(int(sample_of[row]), row >= n): task.crop(row, 500, 375) for rows in task.rows for row in rows}

    shares = [crops(world) for world in rank_of(4)]
    assert {key: value for share in shares for key, value in share.items()} == crops(World())


@pytest.mark.parametrize("exchange", ["loader", "auto", "all_to_all"])
def test_world_size_changes_no_view(photos, loader, root_for, exchange):
    """Whoever makes a key view, on one host or two."""
    config = config_of(root_for(loader, photos), loader, exchange=exchange)
    alone = batches_of(config, 2, 4)
    shares = [batches_of(config, 2, 4, world) for world in rank_of(4)]
    for step in range(2):
        assert torch.equal(torch.cat([share[step].view_q for share in shares]), alone[step].view_q)
        samples = torch.cat([share[step].samples_k for share in shares])
        keys = torch.cat([share[step].view_k for share in shares])[samples.argsort()]
        assert torch.equal(keys, alone[step].view_k[alone[step].samples_k.argsort()])


def test_a_step_needs_none_before_it(photos, loader, root_for):
    config = config_of(root_for(loader, photos), loader)
    assert_same(batches_of(config, 3, 5), batches_of(config, 0, 5)[3:])


@pytest.mark.parametrize("settings", [{"num_workers": 2}, {"num_workers": 1, "prefetch_batches": 1}])
def test_workers_and_prefetching_change_no_pixel(photos, loader, root_for, settings):
    root = root_for(loader, photos)
    assert_same(batches_of(config_of(root, loader, **settings)), batches_of(config_of(root, loader)))


def test_evaluation_s_centre_crops_agree(photos, loader, root_for):
    def crops(name):
        folder = find_images(root_for(name, photos), "val")
        data = EvalDataConfig.model_validate({"loader": name, "num_workers": 0, "batch_size": 4})
        found = list(eval_batches(folder, np.arange(len(folder.paths)), data, 72, SIZE, World()))
        assert [len(indices) for _, indices in found] == [4, 2]
        return torch.cat([views for views, _ in found]), folder

    (ours, ours_of), (reference, reference_of) = crops(loader), crops("torchvision")
    assert (ours.int() - reference.int()).abs().float().mean() <= (0.3 if loader == "dali" else 0)
    assert ours_of.paths == reference_of.paths and ours_of.classes == reference_of.classes
    assert (ours_of.labels == reference_of.labels).all()


def test_an_evaluation_resizes_no_more_of_a_stripe_than_its_view(tmp_path, loader, root_for):
    """A stripe's short side becomes 256, and all of it would be 4 GB."""
    for i, size in enumerate([(20_000, 1), (1, 20_000), (90, 80), (9, 9)]):
        path = tmp_path / "stripes" / ("val" if i < 3 else "train") / "x" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, *size).save(path)
    folder = find_images(root_for(loader, tmp_path / "stripes"), "val")
    data = EvalDataConfig.model_validate({"loader": loader, "num_workers": 0, "batch_size": 4})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ((views, _),) = eval_batches(folder, np.arange(3), data, 256, 224, World())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kilobytes
    assert views.shape == (3, 3, 224, 224)
    assert views.float().std((1, 2, 3)).min() > 1


@pytest.fixture(scope="module")
def odd_photos(tmp_path_factory):
    """One of each kind that PIL reads and that a fast decoder might not."""
    root = tmp_path_factory.mktemp("odd")
    image = picture(1, 120, 90)
    image.convert("CMYK").save(root / "cmyk.jpg")
    image.convert("L").save(root / "gray.jpg")
    image.save(root / "png_in_disguise.jpg", "PNG")
    image.save(root / "progressive.jpg", progressive=True)
    image.save(root / "no_subsampling.jpg", subsampling=0)
    image.save(root / "rgb_inside.jpg", keep_rgb=True)
    image.convert("RGBA").save(root / "alpha.png")
    image.convert("P").save(root / "palette.png")
    image.save(root / "web.webp")
    Image.fromarray((np.arange(120 * 90).reshape(90, 120) * 6).astype(np.uint16)).save(root / "16_bit.png")
    picture(2, 1, 1).save(root / "one_pixel.jpg")
    picture(3, 1, 400).save(root / "one_column.jpg")
    picture(4, 2100, 1500).save(root / "huge.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter, which torchvision's and PIL's loaders do not undo
    image.save(root / "turned.jpg", exif=exif)
    exif[0x010E] = "x" * 65_000
    image.save(root / "large_metadata.jpg", exif=exif)
    (root / "trailing.jpg").write_bytes((root / "gray.jpg").read_bytes() + b"\0" * 100)
    return root


def test_odd_images_look_alike_to_all_loaders(odd_photos, loader, root_for, capfd):
    """16 files in 2 batches, so each gives two views; the huge one is decoded at a smaller size by some."""
    ours = batches_of(config_of(root_for(loader, odd_photos), loader), 0, 2)
    reference = batches_of(config_of(odd_photos, "torchvision"), 0, 2)
    assert not any(batch.replaced for batch in ours)
    assert "DALI failed" not in capfd.readouterr().err  # what DALI cannot take is seen by its first bytes and last two
    if loader != "ffcv":
        assert_same(ours, reference, *((1.0, 60) if loader == "dali" else (0, 0)))
    else:  # what is no plain JPEG was encoded anew
        assert_same(ours, reference, 3.0, 255)


REASONS = {
    "missing": "no such file", "directory": "is a directory", "pipe": "and no file", "empty": "the file is empty",
    "one byte": "not an image", "text": "not an image", "truncated": "truncated", "no end": "truncated",
    "header only": "", "random": "not an image",
}  # fmt: skip


@pytest.mark.parametrize(("name", "num_workers"), [*((name, 0) for name in REASONS), ("truncated", 1)])
def test_a_file_that_cannot_be_read_ends_the_run_by_its_name(tmp_path, folder_loader, name, num_workers):
    config = config_of(tmp_path, folder_loader, num_workers=num_workers)
    undamaged(tmp_path)
    folder = find_images(tmp_path, "train")
    bad = damaged(tmp_path, name)
    with pytest.raises(ImageError, match=rf"cannot read image {bad}: .*{REASONS[name]}"):
        list(pretrain_batches(folder, config, Plan(8, BATCH, 0), World(), 0, 2))
    assert multiprocessing.active_children() == []  # no worker waits for anything


@pytest.mark.parametrize("name", ["truncated", "empty", "random"])
def test_successors_take_the_places_of_files_that_cannot_be_read(tmp_path, folder_loader, name, capfd):
    """The view is the successor's, by the draws of the sample that it stands for; each file is named."""
    bad = damaged(tmp_path, name)
    skip = {"on_error": "skip-and-report"}
    ours = batches_of(config_of(tmp_path, folder_loader, **skip), 0, 2)
    assert "DALI failed" not in capfd.readouterr().err
    assert [len(batch.replaced) for batch in ours] == [1, 1]
    assert all(batch.replaced[0].startswith(f"cannot read image {bad}: ") for batch in ours)
    reference = batches_of(config_of(tmp_path, "torchvision", **skip), 0, 2)
    tolerance = (0.3, 16) if folder_loader == "dali" else (0, 0)
    assert_same(ours, reference, *tolerance)
    (tmp_path / "3.jpg").write_bytes((tmp_path / "4.jpg").read_bytes())
    assert_same(ours, batches_of(config_of(tmp_path, folder_loader), 0, 2), *tolerance)


@pytest.mark.parametrize("name", ["missing", "empty", "random"])
def test_a_file_that_goes_bad_later_is_named_by_dali_too(tmp_path, monkeypatch, name):
    pytest.importorskip("nvidia.dali")
    undamaged(tmp_path)
    folder = find_images(tmp_path, "train")
    sizes_known_already(monkeypatch, tmp_path)
    bad = damaged(tmp_path, name)
    batches = pretrain_batches(folder, config_of(tmp_path, "dali"), Plan(8, BATCH, 0), World(), 0, 2)
    with pytest.raises(ImageError, match=f"cannot read image {bad}: "):
        list(batches)
    config = config_of(tmp_path, "dali", on_error="skip-and-report")
    ours = list(pretrain_batches(folder, config, Plan(8, BATCH, 0), World(), 0, 2))
    assert [len(batch.replaced) for batch in ours] == [1, 1]


def test_a_read_that_fails_inside_dali_but_not_twice_costs_nothing(tmp_path, monkeypatch, capfd):
    """A hiccup of the storage: the host reads the batch again, and batches behind it are not lost."""
    pytest.importorskip("nvidia.dali")
    undamaged(tmp_path)
    bad = tmp_path / "3.jpg"
    reference = batches_of(config_of(tmp_path, "torchvision"), 0, 5)
    sizes_known_already(monkeypatch, tmp_path)
    content, cut = bad.read_bytes(), Files.cut
    folder = find_images(tmp_path, "train")
    bad.unlink()
    reads = []

    def back_again(self, *args):
        bad.write_bytes(content)
        reads.append(args[0])
        return cut(self, *args)

    monkeypatch.setattr(Files, "cut", back_again)
    ours = list(pretrain_batches(folder, config_of(tmp_path, "dali"), Plan(8, BATCH, 0), World(), 0, 5))
    assert 8 <= len(reads) < 40  # the failing batch, not all
    assert "warning: DALI failed at a batch, which the host decodes" in capfd.readouterr().err
    assert_same(ours, reference, 0.3, 16)


def test_what_only_dali_cannot_decode_is_said(tmp_path, monkeypatch):
    """Files that the host reads well while DALI fails at batch after batch: DALI's own problem."""
    pytest.importorskip("nvidia.dali")
    for i in range(8):
        picture(i, 90, 110).save(tmp_path / f"{i}.jpg", "GIF")
    sizes_known_already(monkeypatch, tmp_path)
    with pytest.raises(UserError, match="DALI cannot decode these files: "):
        batches_of(config_of(tmp_path, "dali"), 0, 6)


def test_a_packed_file_that_was_damaged_names_the_image(photos, tmp_path):
    packed = pack(photos, tmp_path / "x.beton")
    beton = read_beton(packed)
    row = beton.names.index("train/class_0/06.jpg")
    with packed.open("r+b") as file:
        file.seek(int(beton.start[row]))
        file.write(b"\0" * 200)
    with pytest.raises(ImageError, match=rf"cannot read image {packed}/train/class_0/06.jpg: not an image"):
        batches_of(config_of(packed, "ffcv"), 0, 4)
    ours = batches_of(config_of(packed, "ffcv", on_error="skip-and-report"), 0, 4)
    assert sum(len(batch.replaced) for batch in ours) >= 1


def test_all_images_in_a_row_unreadable_is_said_once(tmp_path, folder_loader):
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(b"no")
    with pytest.raises(ImageError, match="100 images in a row cannot be read; the last: cannot read image"):
        batches_of(config_of(tmp_path, folder_loader, on_error="skip-and-report"), 0, 1)


def test_loaders_and_roots_that_do_not_fit_are_named(photos, tmp_path):
    packed = pack(photos, tmp_path / "x.beton")
    with pytest.raises(UserError, match=r"is a folder; moco-dist data pack FOLDER FILE\.beton makes one"):
        batches_of(config_of(photos, "ffcv"))
    with pytest.raises(UserError, match=r"x\.beton is a packed file, which data\.loader ffcv reads, not torchvision"):
        batches_of(config_of(packed, "torchvision"))


def test_dali_missing_says_how_to_install_it(photos, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"pip install 'moco_dist\[dali\]'.*nvidia-dali-cuda120"):
        batches_of(config_of(photos, "dali"))


def test_dali_on_a_gpu_that_is_not_there_is_refused(photos):
    pytest.importorskip("nvidia.dali")
    with pytest.raises(UserError, match="decode_on gpu needs a GPU"):
        batches_of(config_of(photos, "dali", dali={"decode_on": "gpu"}))


@pytest.mark.gpu
def test_dali_on_a_gpu_gives_the_reference_s_views(photos):
    pytest.importorskip("nvidia.dali")
    world = World(device="cuda:0")
    ours = batches_of(config_of(photos, "dali", dali={"decode_on": "gpu"}), 5, 8, world)
    assert all(batch.view_q.is_cuda and batch.view_k.is_cuda for batch in ours)
    assert_same([b.to(torch.device("cpu")) for b in ours], batches_of(config_of(photos, "torchvision"), 5, 8), 2.0, 64)


def test_a_packed_source_goes_to_a_new_process(photos, tmp_path):
    source = PackedFile(find_images(pack(photos, tmp_path / "x.beton"), "train"))
    data = pickle.dumps(source)
    assert len(data) < 20_000  # not the file's content
    config = config_of("unused", "ffcv")
    task = view_task(0, config, Plan(len(source), BATCH, 0), World())
    args = (int(task.samples[0]), SIZE, lambda w, h: task.crops(0, w, h))
    assert all(torch.equal(a, b) for a, b in zip(pickle.loads(data).cut(*args), source.cut(*args), strict=True))


@pytest.mark.slow
def test_memory_does_not_grow_over_epochs(photos, loader, root_for):
    """After a first epoch, 60 more add less than a batch's worth of pixels each ten."""
    config = config_of(root_for(loader, photos), loader)
    process = psutil.Process(os.getpid())

    def resident_after(stop):
        folder = find_images(config.data.root, "train")
        for _ in pretrain_batches(folder, config, Plan(len(folder.paths), BATCH, 0), World(), 0, stop):
            pass
        gc.collect()
        return process.memory_info().rss

    resident_after(60)
    before = resident_after(60)
    grown = resident_after(360) - before
    assert grown < 20 * 2**20, f"{grown / 2**20:.1f} MiB in 300 batches of 0.2 MiB"
