"""Addresses of data: text in a config, and one line for what is none."""

import pickle
from pathlib import Path

import pytest

from moco_dist.config.address import Url, root_of
from moco_dist.config.evaluate import KnnConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import flatten, read_config, to_yaml
from moco_dist.errors import UserError

RUN = ["--run.dir", "run"]


@pytest.mark.parametrize("text", ["s3://bucket/a/b", "gs://b/x.beton", "az://c/set-{00..03}.tar", "https://host/x.tar"])
def test_an_address_stays_text_in_a_config(text, tmp_path):
    config = read_config(PretrainConfig, None, [*RUN, "--data.root", text])
    assert isinstance(config.data.root, Url)
    assert (config.data.root, flatten(config)["data.root"]) == (text, text)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(PretrainConfig, tmp_path / "config.yaml", []) == config
    assert read_config(KnnConfig, None, ["--run-dir", "run", "--data.root", text]).data.root == text


def test_a_path_stays_a_path():
    for text in ("data/x", "~/x", "C:/x", "5", "[1]"):
        root = read_config(PretrainConfig, None, [*RUN, "--data.root", text]).data.root
        assert root == Path(text).expanduser() and isinstance(root, Path)
    assert read_config(KnnConfig, None, ["--run-dir", "run", "--data.root", "null"]).data.root is None


def test_an_address_that_has_become_a_path_is_told():
    with pytest.raises(UserError, match=r"s3:/bucket/a: an address is given as text; a Path makes s3:/ of s3://"):
        root_of(Path("s3://bucket/a"))
    with pytest.raises(ValueError, match="an address is given as text"):
        PretrainConfig.model_validate({"run": {"dir": "r"}, "data": {"root": Path("https://host/x.tar")}})


def test_the_parts_of_an_address():
    url = pickle.loads(pickle.dumps(root_of("s3://bucket/a/set-0.tar")))
    assert (url.scheme, url.store, url.key, url.name, url.stem, url.suffix) == (
        "s3", "s3://bucket", "a/set-0.tar", "set-0.tar", "set-0", ".tar",
    )  # fmt: skip
    assert (url.parent, url.parent.parent, url.parent.parent.parent) == ("s3://bucket/a", "s3://bucket", "s3://bucket")
    assert root_of("s3://bucket/") / "x" == "s3://bucket/x"
    assert isinstance(url.parent / "x", Url)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("s3:/bucket/a", "s3:/bucket/a is no address; did you mean s3://bucket/a?"),
        ("s3:///bucket", "did you mean s3://bucket?"),
        ("S3://bucket", "did you mean s3://bucket?"),
        ("s4://bucket", "begin with s3://, gs://, az://, https://, http://; did you mean s3?"),
        ("gcs://bucket/a", "did you mean gs://bucket/a?"),
        ("s3a://bucket/a", "did you mean s3://bucket/a?"),
        ("file:///data/x", "a path is written without file://; did you mean /data/x?"),
        ("s3://", "s3:// names no bucket"),
        ("s3://bucket/$SET/x", "has $SET, which only a shell replaces"),
        ("https://user:a-password@host/x.tar", "credentials come from the environment"),
        ("https://host/x.tar?token=a-password", "credentials come from the environment"),
        ("https://host/x.tar?X-Amz-Signature=a-password", "credentials come from the environment"),
    ],
)
def test_what_is_no_address(text, says):
    with pytest.raises(UserError) as error:
        read_config(PretrainConfig, None, [*RUN, "--data.root", text])
    assert says in str(error.value)
    assert "a-password" not in str(error.value)
    assert "\n" not in str(error.value)
