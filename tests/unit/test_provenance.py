"""What a result depends on beside its settings."""

from moco_dist.provenance import source_hash


def test_other_code_has_another_hash(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    before = source_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("no code")
    assert source_hash(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2\n")
    assert source_hash(tmp_path) != before
    assert len(source_hash()) == 16
