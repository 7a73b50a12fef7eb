"""RUN/ is known to one module, and what is no run is refused there."""

import re
from pathlib import Path

import pytest

import moco_dist
from moco_dist.data.names import hash_of_list
from moco_dist.errors import UserError
from moco_dist.files import key_of
from moco_dist.report.page import evaluations
from moco_dist.run.folder import RunFolder

NAMES = ("config.yaml", "log.jsonl", ".lock", "preempted.json", "checkpoints", "backbone.safetensors", "eval")


@pytest.mark.parametrize("called", ["", "run_dir"])
def test_what_is_no_run_is_refused(tmp_path, called):
    expected = f"{called} {tmp_path} is not the folder of a run: it has no config.yaml".lstrip()
    for do in (RunFolder(tmp_path).require, RunFolder(tmp_path).settings):
        with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
            do(called)


def test_settings_of_another_version_are_named_with_their_file(tmp_path):
    RunFolder(tmp_path).config.write_text("run: {dir: x}\ndata: {root: x}\noptim: {clip_norm: 1}\n")
    with pytest.raises(UserError, match=r"config.yaml does not fit moco_dist \S+: unknown setting optim.clip_norm"):
        RunFolder(tmp_path).settings()


@pytest.mark.parametrize(
    "content", [b"", b"12", b"\0\0", b"\xff", b'{"accuracy":', b"[" * 100_000], ids=lambda c: repr(c[:9])
)
def test_a_damaged_result_is_named_with_a_way_out(tmp_path, content):
    path = RunFolder(tmp_path).result("knn", "trained")
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UserError, match="knn_trained.json is damaged: .*; remove it, and evaluate again"):
        evaluations(tmp_path)


def test_no_other_module_spells_a_name_of_the_folder():
    package = Path(moco_dist.__file__).parent
    spelt = re.compile(rf'/ "({"|".join(map(re.escape, NAMES))})"')
    found = [path.name for path in sorted(package.rglob("*.py")) if spelt.search(path.read_text(encoding="utf-8"))]
    assert found == ["folder.py"]


def test_keys_are_those_of_older_versions():
    """Or features and trainings that lie on disks would not be found."""
    assert key_of({"paths": ["a", 1]}) == "18e8d91c270ead29"
    assert hash_of_list(["a/1.jpg", "a/2.jpg"])[:16] == "1bc2d8d161cf31d5"
    assert hash_of_list(["caf\udce9.jpg"])  # a name that is not UTF-8
