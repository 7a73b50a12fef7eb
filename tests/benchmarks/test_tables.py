"""What the documentation says was measured is what the results say."""

import pytest

from benchmarks import tables


@pytest.mark.parametrize("name", tables.PAGES)
def test_pages_are_what_the_generator_makes(name):
    page = (tables.ROOT / name).read_text()
    assert tables.MARKED.search(page)
    assert page == tables.filled(page), "run python -m benchmarks.tables"


def test_the_newest_result_of_each_hardware(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    row = {"what": "SGD", "seconds": 0.02, "floor_seconds": 0.01}
    for hardware, date in (("cpu-2cores", "2026-01-01"), ("cpu-2cores", "2026-02-01"), ("cuda-h100", "2026-01-15")):
        text = (f'{{"hardware": "{hardware}", "date": "{date}", "versions": {{"torch": "2"}}, "command": "c", '
                f'"rows": [{str(row).replace(chr(39), chr(34))}]}}')  # fmt: skip
        (tmp_path / f"update_{hardware}_{date}.json").write_text(text)
    page = tables.filled("<!-- benchmarks:update -->\nold\n<!-- /benchmarks -->\n")
    assert "old" not in page
    assert "2026-01-01" not in page
    assert "2026-02-01" in page and "2026-01-15" in page
    assert "| SGD | 20.0 | 10.0 | 2.0 |" in page
    assert tables.filled("<!-- benchmarks:network -->\n<!-- /benchmarks -->\n").count("Not run yet.") == 1
