"""Bytes between hosts, read from their network interfaces."""

import subprocess

import pytest

from benchmarks import network
from benchmarks.hosts import hosts, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="module")
def rows():
    with hosts(2) as made:
        measured = network.measure(made, 1.0, 1, **network.QUICK)
        prefix = made.prefix
    assert prefix not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {row["exchange"]: row for row in measured}


def test_no_image_crosses_the_network(rows):
    """In `loader` what arrives is the features, headers included: not one image (3 S² = 12,288 bytes) beside them."""
    row = rows["loader"]
    assert row["predicted_image_bytes"] == 0
    assert row["predicted_feature_bytes"] < row["received_bytes"] < 1.1 * row["predicted_feature_bytes"]
    assert row["received_bytes"] - row["predicted_feature_bytes"] < 3 * network.QUICK["image_size"] ** 2


@pytest.mark.parametrize("exchange", ["all_to_all", "all_gather"])
def test_images_are_as_many_bytes_as_predicted(rows, exchange):
    row = rows[exchange]
    predicted = row["predicted_image_bytes"] + row["predicted_feature_bytes"]
    assert predicted < row["received_bytes"] < 1.1 * predicted


def test_gradients_are_as_many_bytes_as_predicted(rows):
    for row in rows.values():
        gradients = row["received_bytes_with_gradients"] - row["received_bytes"]
        assert row["predicted_gradient_bytes"] < gradients < 1.1 * row["predicted_gradient_bytes"]
