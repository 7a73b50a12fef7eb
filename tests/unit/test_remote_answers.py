"""Stores that refuse, name what to set and never a secret; servers that are slow, stop, or have changed."""

import multiprocessing
import os
import time

import numpy as np
import pytest

from moco_dist.config.address import Url
from moco_dist.data.remote import source, store
from moco_dist.data.sources import bytes_reader, find_images
from moco_dist.errors import InfrastructureError, UserError
from tests.answers import REFUSALS, answering
from tests.stores import CREDENTIALS
from tests.tars import write_tar

pytestmark = pytest.mark.slow
IMAGES = [(f"train/a/{i}.jpg", bytes([i]) * 3_000) for i in range(9)]
SAYS = {
    "forbidden": "access is denied: 403 Forbidden (AccessDenied); s3:ListBucket and s3:GetObject are needed",
    "unknown": "the store does not take the credentials: 403 Forbidden (InvalidAccessKeyId); set AWS_ACCESS_KEY_ID",
    "unsigned": "the store does not take the credentials: 403 Forbidden (SignatureDoesNotMatch); set AWS_ACCESS_KEY_ID",
    "expired": "the store does not take the credentials: 400 Bad Request (ExpiredToken); set AWS_ACCESS_KEY_ID",
    "moved": "the bucket is in another region, and AWS_REGION is us-east-1",
    "region": "the bucket is in eu-north-1, and AWS_REGION is us-east-1",
}


@pytest.fixture
def folder(tmp_path):
    write_tar(tmp_path / "train.tar", IMAGES)
    return tmp_path


@pytest.fixture
def server(folder, monkeypatch):
    """Its address. Time-outs are tenths of seconds, and a request is made three times."""
    monkeypatch.setattr(store, "_CLIENT", {"connect_timeout": "1s", "read_timeout": "600ms", "timeout": "1500ms"})
    monkeypatch.setattr(store, "FIRST_WAITS_SECONDS", (0.1, 0.1))
    monkeypatch.setattr(source, "READ_WAITS_SECONDS", (0.1, 0.1))
    with answering(folder) as url:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": url}.items():
            monkeypatch.setenv(name, value)
        yield url


def in_a_child(ask):
    """What `ask()` returns or raises; it is done within a minute."""
    here, there = multiprocessing.Pipe()

    def work():
        try:
            there.send(ask())
        except Exception as error:
            there.send(error)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    assert here.poll(60)
    child.join()
    return here.recv()


def contents(found):
    """All images, announced as a worker does it, and read in another order."""
    images = bytes_reader(found).__self__
    images.announce(np.arange(len(found.paths)))
    return {found.paths[i]: bytes(images.content(i)[0]) for i in reversed(range(len(found.paths)))}


ALL = {name.removeprefix("train/"): content for name, content in IMAGES}


def asked(folder):
    return (folder / "asked").read_text().splitlines()


@pytest.mark.parametrize("bucket", REFUSALS)
@pytest.mark.parametrize("key", ["set", "x.beton"])
def test_a_store_that_refuses_says_what_to_set_and_no_secret(server, folder, bucket, key):
    url = Url(f"s3://{bucket}/{key}")
    error = in_a_child(lambda: find_images(url, "train"))
    assert type(error) is UserError, error
    text = str(error)
    assert text.startswith(f"s3://{bucket}/") and "\n" not in text
    for secret in (*CREDENTIALS.values(), "Signature=", "Credential="):
        assert secret not in text.replace("AWS_REGION is us-east-1", "")
    if key == "set":
        assert text.startswith(f"{url} cannot be read: {SAYS[bucket]}")
    else:  # an answer to HEAD has no body, and so no code
        assert any(word in text for word in ("AWS_REGION", "s3:GetObject"))
    assert len(asked(folder)) <= 3  # a refusal is no hiccup


@pytest.fixture
def azure(server, monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "tester")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "YS1zZWNyZXQtb2YtdGVzdHM=")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"{server}/azure")


def test_azure_names_an_object_in_a_listing_and_alone_as_the_same_one(azure, folder):
    found = find_images(Url("az://set"), "train")
    assert in_a_child(lambda: contents(found)) == ALL
    write_tar(folder / "train.tar", [(name, content) for name, content in reversed(IMAGES)])
    error = in_a_child(lambda: contents(found))
    assert type(error) is UserError and str(error).endswith("it has changed since its images were listed; start again")


def test_azure_says_that_there_is_no_container_and_that_a_key_is_damaged(azure, monkeypatch):
    error = in_a_child(lambda: find_images(Url("az://other"), "train"))
    assert isinstance(error, UserError) and str(error) == "az://other cannot be read: there is no bucket az://other"
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "not base 64")
    error = in_a_child(lambda: find_images(Url("az://set"), "train"))
    assert isinstance(error, UserError) and str(error) == (
        "az://set cannot be read: the environment's credentials are damaged (AZURE_STORAGE_ACCOUNT_NAME and "
        "AZURE_STORAGE_ACCOUNT_KEY)"
    )


@pytest.mark.parametrize("how", ["trickles", "stops", "stalls"])
def test_a_server_that_sends_half_an_object_is_not_waited_for_for_ever(server, folder, how):
    root = Url(f"{server}/{how}/train.tar")
    found = find_images(root, "train")
    (folder / "fails").touch()
    started = time.monotonic()
    error = in_a_child(lambda: contents(found))
    assert time.monotonic() - started < 45
    assert isinstance(error, InfrastructureError), error
    assert str(error).startswith("cannot read image ") and f"in {root}: " in str(error) and "\n" not in str(error)
    (folder / "fails").unlink()
    assert in_a_child(lambda: contents(found)) == ALL


@pytest.mark.parametrize("how", ["plain", "careless", "untagged"])
def test_an_object_that_changes_in_mid_run_is_named(server, folder, how):
    """Whether the server minds the tag that is asked for, does not, or has none at all; the size stays."""
    root = Url(f"{server}/{how}/train.tar")
    found = find_images(root, "train")
    assert in_a_child(lambda: contents(found)) == ALL
    write_tar(folder / "train.tar", [(name, content) for name, content in reversed(IMAGES)])
    os.utime(folder / "train.tar", (time.time() - 3000, time.time() - 3000))
    error = in_a_child(lambda: contents(found))
    assert type(error) is UserError
    assert f"in {root}: it has changed since its images were listed; start again" in str(error)


def test_a_server_that_gives_no_parts_is_told(server, folder):
    error = in_a_child(lambda: find_images(Url(f"{server}/whole/train.tar"), "train"))
    assert isinstance(error, UserError) and "\n" not in str(error), error
    assert str(error).endswith("the server gives no parts of a file, which images are; download it")


def test_listing_asks_once_for_each_image(server, folder):
    """And some times for each shard: of what lies between headers no more is fetched than a window holds."""
    large = [(f"train/{i}.jpg", os.urandom(50_000)) for i in range(40)]
    for i in range(4):
        write_tar(folder / f"train-{i}.tar", large[i::4])
    found = find_images(Url(f"{server}/plain/train-{{0..3}}.tar"), "train")
    assert len(found.paths) == 40
    parts = [line.partition("bytes=")[2].split("-") for line in asked(folder) if "bytes=" in line]
    assert 40 <= len(parts) <= 40 + 3 * 4
    assert sum(int(end) + 1 - int(start) for start, end in parts) < 40 * 50_000 / 8


def test_a_web_server_that_refuses_is_told(server):
    error = in_a_child(lambda: find_images(Url(f"{server}/forbidden/train.tar"), "train"))
    assert type(error) is UserError
    assert str(error).endswith("access is denied: 403 Forbidden; no credentials are sent to a web server")
