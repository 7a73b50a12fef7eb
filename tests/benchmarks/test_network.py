"""Bytes between hosts, read from their network interfaces."""

import subprocess

import pytest

from benchmarks import network
from benchmarks.hosts import hosts, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="module")
def measured():
    """By exchange, and whether a host has two ranks and a block fits it."""
    with hosts(2) as made:
        measured = network.measure(made, 1.0, 1, **network.QUICK)
        measured += network.measure(made, 1.0, 1, **network.QUICK, ranks_a_host=2)
        prefix = made.prefix
    assert prefix not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {(row["exchange"], row["ranks"] == 4, row["block_size"] == 64): row for row in measured}


@pytest.fixture(scope="module")
def rows(measured):
    """Those of hosts with one rank."""
    return {exchange: row for (exchange, has_two_ranks, _), row in measured.items() if not has_two_ranks}


def test_no_image_crosses_the_network(rows):
    """In `loader` what arrives is the features, headers included: not one image (3 S² = 6,912 bytes) beside them."""
    row = rows["loader"]
    assert row["predicted_image_bytes"] == 0
    assert row["predicted_feature_bytes"] < row["received_bytes"] < 1.1 * row["predicted_feature_bytes"]
    assert row["received_bytes"] - row["predicted_feature_bytes"] < 3 * network.QUICK["image_size"] ** 2


@pytest.mark.parametrize("fits", [True, False])
def test_by_default_no_image_crosses_whether_a_block_fits_a_host_or_not(measured, fits):
    row = measured["auto", True, fits]
    assert row["predicted_image_bytes"] == 0
    assert row["predicted_feature_bytes"] < row["received_bytes"] < 1.1 * row["predicted_feature_bytes"]


def test_images_between_hosts_of_two_ranks_are_as_many_bytes_as_predicted(measured):
    row = measured["all_to_all", True, False]
    predicted = row["predicted_image_bytes"] + row["predicted_feature_bytes"]
    assert row["predicted_image_bytes"] > 0
    assert predicted < row["received_bytes"] < 1.1 * predicted


@pytest.mark.parametrize("exchange", ["all_to_all", "all_gather"])
def test_images_are_as_many_bytes_as_predicted(rows, exchange):
    row = rows[exchange]
    predicted = row["predicted_image_bytes"] + row["predicted_feature_bytes"]
    assert predicted < row["received_bytes"] < 1.1 * predicted


def test_gradients_are_as_many_bytes_as_predicted(measured):
    for row in measured.values():
        gradients = row["received_bytes_with_gradients"] - row["received_bytes"]
        assert row["predicted_gradient_bytes"] < gradients < 1.1 * row["predicted_gradient_bytes"]
