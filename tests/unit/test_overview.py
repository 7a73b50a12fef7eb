"""Neighbours and maps of features, against numpy; and their page."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from moco_dist.data.images import ImageFolder
from moco_dist.data.names import Names
from moco_dist.errors import UserError
from moco_dist.evaluate import overview as module
from moco_dist.evaluate.overview import overview, principal_components
from moco_dist.report.map import in_two_dimensions, map_of_run, one_a_cell, scatter, write_features_page

FEATURES = torch.randn(41, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [1, 7, 41])
def test_neighbours_are_the_nearest_but_for_the_image_itself(size, monkeypatch):
    monkeypatch.setattr(module, "MAP_IMAGES", 10)
    found = overview(lambda: iter(FEATURES.split(size)), 41)
    unit = FEATURES.numpy() / np.linalg.norm(FEATURES.numpy(), axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    queries = [i * 41 // 8 for i in range(8)]
    assert found.neighbours == {q: np.argsort(-cosine[q])[:5].tolist() for q in queries}
    assert found.mapped == [i * 41 // 10 for i in range(10)]
    torch.testing.assert_close(found.components, principal_components(FEATURES[found.mapped]))


def test_few_images_have_few_neighbours():
    assert overview(lambda: iter([FEATURES[:2]]), 2).neighbours == {0: [1], 1: [0]}
    alone = overview(lambda: iter([FEATURES[:1]]), 1)
    assert (alone.neighbours, alone.mapped) == ({0: []}, [0])


def test_components_are_those_of_the_singular_values():
    unit = (FEATURES / FEATURES.norm(dim=1, keepdim=True)).double().numpy()
    _, singular, directions = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    expected = (unit - unit.mean(0)) @ directions.T
    found = principal_components(FEATURES).double().numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), singular, rtol=1e-5)


def test_without_umap_the_map_is_the_first_two_components(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    components = principal_components(FEATURES)
    points, by = in_two_dimensions(components)
    assert by == "principal components" and np.array_equal(points, components[:, :2].numpy())
    assert in_two_dimensions(components[:3, :1])[0].tolist() == [[x, 0.0] for x in components[:3, 0].tolist()]


def test_where_umap_is_installed_it_makes_the_map(monkeypatch):
    """A stand-in: the real one compiles itself for minutes on two cores."""
    given = []

    class Umap:
        def __init__(self, random_state):
            given.append(random_state)

        def fit_transform(self, values):
            return values[:, 1:3].astype(np.float64)

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap))
    components = principal_components(FEATURES)
    points, by = in_two_dimensions(components)
    assert (by, given, points.dtype) == ("UMAP", [0], np.float32)
    assert np.array_equal(points, components[:, 1:3].numpy())
    assert in_two_dimensions(components[:10])[1] == "principal components"  # too few for it


def test_pictures_on_a_map_do_not_cover_one_another():
    points = np.random.default_rng(0).random((500, 2)).astype(np.float32)
    rows = one_a_cell(points, 4)
    assert len(rows) == len({tuple((points[row] * 3.999).astype(int)) for row in rows}) == 16
    assert one_a_cell(np.zeros((3, 2), np.float32)) == [0]


@pytest.mark.parametrize("num_classes", [0, 3, 15, 300])
def test_a_map_of_any_number_of_classes(num_classes):
    labels = np.arange(300) % num_classes if num_classes else np.full(300, -1)
    points = np.random.default_rng(1).random((300, 2)).astype(np.float32)
    picture = scatter("features", points, labels, [f"class {i}" for i in range(num_classes)])
    assert picture.png().startswith(b"\x89PNG") and "300 images" in picture.alt
    names = [name for _, name in picture.legend]
    assert names == ([f"class {i}" for i in range(num_classes)] if num_classes <= 20 else [])
    assert len({colour for colour, _ in picture.legend}) == len(names)


def page_of(path, paths, labels, classes):
    images = ImageFolder(path.parent, Names.of(paths), np.array(labels), classes)
    asked = []

    def thumbnails_of(numbers):
        asked.extend(numbers)
        return {number: np.full((8, 8, 3), number, np.uint8) for number in numbers}

    components = principal_components(FEATURES[: len(paths)])
    write_features_page(path, ["a line"], images, {0: [2, 1]}, list(range(len(paths))), components, thumbnails_of)
    assert asked == sorted(set(asked))
    text = path.read_text()
    assert not re.search(r'(src|href)="(?!data:)|<script|@import', text)  # needs no other file
    return text


def test_the_page_marks_neighbours_by_class_where_there_are_classes(tmp_path):
    paths, labels = ["a/0.jpg", "a/<1>.jpg", "b/2.jpg", "b/3.jpg"], [0, 0, 1, 1]
    text = page_of(tmp_path / "page.html", paths, labels, ("a", "b"))
    assert re.findall(r'<figure class="(query|right|wrong|)">', text) == ["query", "wrong", "right"]
    assert "a/&lt;1&gt;.jpg" in text and "a colour is a class" in text
    assert re.findall(r"</span>(.*?)</li>", text) == ["a", "b"]  # text: a phone does not shrink it
    plain = page_of(tmp_path / "plain.html", paths, [-1] * 4, ())
    assert re.findall(r'<figure class="(query|right|wrong|)">', plain) == ["query", "", ""]
    assert "✓" not in plain and "a colour" not in plain


def test_the_map_of_a_run_is_the_one_that_was_written(tmp_path):
    assert map_of_run(tmp_path) is None
    (tmp_path / "eval").mkdir()
    path = tmp_path / "eval" / "map.safetensors"
    tensors = {"components": principal_components(FEATURES[:10]), "labels": torch.zeros(10, dtype=torch.int64)}
    path.write_bytes(safetensors.torch.save(tensors, metadata={"classes": json.dumps(["cats"])}))
    assert map_of_run(tmp_path).alt == "the features by principal components: 10 images"
    of_no_class = safetensors.torch.save(tensors | {"labels": torch.ones(10).long()}, metadata={"classes": '["cats"]'})
    of_fewer = safetensors.torch.save(tensors | {"labels": torch.zeros(9).long()}, metadata={"classes": '["cats"]'})
    for damaged in (b"cut", of_no_class, of_fewer):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"map.safetensors is damaged.*knn again"):
            map_of_run(tmp_path)
