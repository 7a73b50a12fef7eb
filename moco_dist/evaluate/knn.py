"""Weighted nearest neighbours in the features (Wu et al. 2018, arXiv 1805.01978, sec. 3.4): nothing is trained.

The memory, the training images' features, stays sharded. Every rank's queries go to all ranks, each finds the most
similar rows of its shard, and the best of all shards vote.
"""

import itertools
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from moco_dist.config.evaluate import KnnConfig
from moco_dist.distributed.collectives import all_gather, gather_uneven
from moco_dist.distributed.stop import STOP, StopRequest
from moco_dist.distributed.told import Told
from moco_dist.distributed.world import World
from moco_dist.errors import Preempted, UserError
from moco_dist.evaluate.features import Features, extract
from moco_dist.evaluate.overview import EXAMPLE_NEIGHBOURS, MAP_IMAGES, NUM_EXAMPLES, evenly, principal_components
from moco_dist.evaluate.subject import (
    Evaluation,
    frozen,
    frozen_encoder,
    open_evaluation,
    write_result,
)  # fmt: skip
from moco_dist.files import write_whole
from moco_dist.run.folder import RunFolder

QUERIES = 256  # of a rank at once: the similarities take 4 x 256 x (size of the whole memory) bytes a rank


def run_knn(config: KnnConfig, world: World) -> list[dict[str, Any]]:
    """`moco-dist knn`: the accuracy of each of `config.encoders`, into RUN/eval/knn_ENCODER.json. Called by all ranks.

    Returns:
        what was written, one dict an encoder; accuracies in percent.

    Raises:
        UserError: there is no run, no checkpoint or no labelled images, or k is larger than the memory.
        Preempted: somebody asked for an end; the features are kept.
    """
    evaluation = open_evaluation(config, world)
    _check_k(max(config.neighbours), len(evaluation.train.paths))
    results = []
    for name in config.encoders:
        started = time.perf_counter()
        encoder = frozen_encoder(evaluation, name)
        with StopRequest(math.inf, world) as stop:
            with frozen(encoder):
                train, val = (extract(evaluation, encoder, split, stop=stop).to(world.device)
                              for split in ("train", "val"))  # fmt: skip
            accuracy = knn_accuracy(
                train.values, train.labels, val.values, val.labels, config.neighbours, config.temperature,
                len(evaluation.train.classes), world, stop,
            )  # fmt: skip
        if name == "trained":
            _write_examples(evaluation, train, val)
        named = {f"knn_top1_k{k}": value for k, value in accuracy.items()}
        results.append(write_result(evaluation, "knn", encoder, named, time.perf_counter() - started))
    return results


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    neighbours: Sequence[int],
    temperature: float,
    num_classes: int,
    world: World,
    stop: StopRequest | None = None,
) -> dict[int, float]:
    """Share of validation samples whose neighbours vote for their class, over all ranks' samples, each counted once.

    Args:
        train_features: (M, D) this rank's shard of the memory, M of any size, also 0.
        train_labels: int64 (M,).
        val_features: (N, D) this rank's queries, N of any size, also 0.
        val_labels: int64 (N,).
        neighbours: k, one result each.
        temperature: a neighbour's vote weighs exp(cosine / temperature).
        num_classes: labels are below it.
        world: this process.
        stop: who may ask for an end; None: nobody.

    Returns:
        accuracy in percent by k, the same on all ranks.

    Raises:
        UserError: a k is larger than the memory.
        Preempted: somebody asked for an end.
    """
    sizes = all_gather(val_features.new_tensor([[len(train_features), len(val_features)]], dtype=torch.int64), world)
    memory_size, num_queries = sizes.sum(0).tolist()
    _check_k(max(neighbours), memory_size)
    memory, queries = F.normalize(train_features, dim=1), F.normalize(val_features, dim=1)
    correct = torch.zeros(len(neighbours), dtype=torch.int64, device=queries.device)
    starts = range(0, int(sizes[:, 1].max()), QUERIES)
    with Told("kNN", num_queries, "queries", world) as told:
        for number, start in enumerate(starts, 1):
            rows = slice(start, start + QUERIES)
            similarity, labels = nearest(queries[rows], memory, train_labels, max(neighbours), world)
            expected = gather_uneven(val_labels[rows], world)
            predicted = vote(similarity, labels, neighbours, temperature, num_classes)
            correct += (predicted == expected).sum(1)
            told.add(len(expected))
            if stop is not None and stop.agreed(number) == STOP and number < len(starts):
                raise Preempted("the features are kept")
    return {k: 100 * n / num_queries for k, n in zip(neighbours, correct.tolist(), strict=True)}


def nearest(queries: Tensor, memory: Tensor, payload: Tensor, k: int, world: World) -> tuple[Tensor, Tensor]:
    """The k rows of the whole memory with the largest dot product, for every rank's queries; largest first.

    Receives (W - 1) / W of the queries and of W·k candidates a query.

    Args:
        queries: (N, D) this rank's, N of any size.
        memory: (M, D) this rank's shard; k rows or more over all ranks.
        payload: int64 (M,), what is wanted of a row: its label, or its number.
        k: neighbours.
        world: this process.

    Returns:
        similarity (Q, k) and payload int64 (Q, k) for the Q queries of all ranks, in rank order, on every rank.
    """
    queries = gather_uneven(queries, world)
    found = min(k, len(memory))
    similarity, rows = (queries @ memory.T).topk(found, dim=1)
    candidates = payload[rows]
    if world.world_size > 1:
        # A shard of fewer than k rows is filled up with rows that never win; then (W·Q, k) becomes (Q, W·k).
        similarity = all_gather(F.pad(similarity, (0, k - found), value=-torch.inf), world)
        candidates = all_gather(F.pad(candidates, (0, k - found)), world)
        similarity, candidates = (
            x.view(world.world_size, -1, k).transpose(0, 1).flatten(1) for x in (similarity, candidates)
        )
        similarity, best = similarity.topk(k, dim=1)
        candidates = candidates.gather(1, best)
    return similarity, candidates


def vote(similarity: Tensor, labels: Tensor, neighbours: Sequence[int], temperature: float, num_classes: int) -> Tensor:
    """The class with the largest sum of exp(similarity / temperature) over the first k neighbours; the lower at a tie.

    Args:
        similarity: (Q, K), largest first.
        labels: int64 (Q, K).
        neighbours: k, each at most K.
        temperature: in units of cosine.
        num_classes: labels are below it.

    Returns:
        int64 (len(neighbours), Q).
    """
    # Weights are relative to the nearest neighbour's: all classes change alike, and no small temperature overflows.
    weights = torch.exp((similarity - similarity[:, :1]).double() / temperature)
    scores = weights.new_zeros(len(weights), num_classes)
    winners = {}
    for counted, k in itertools.pairwise([0, *sorted(set(neighbours))]):
        scores.scatter_add_(1, labels[:, counted:k], weights[:, counted:k])
        winners[k] = scores.argmax(1)
    return torch.stack([winners[k] for k in neighbours])


def _write_examples(evaluation: Evaluation, train: Features, val: Features) -> None:
    """RUN/eval/neighbours.json: some validation images, spread evenly, and the training images nearest to them.

    And RUN/eval/map.safetensors: principal components of more of them, for a map.
    """
    world, images, queries = evaluation.world, evaluation.train, evaluation.val
    k, run = min(EXAMPLE_NEIGHBOURS, train.total), RunFolder(evaluation.config.run_dir)
    own = torch.isin(val.rows, evenly(val.total, NUM_EXAMPLES).to(val.rows.device))
    asked, memory = F.normalize(val.values[own], dim=1), F.normalize(train.values, dim=1)
    _, found = nearest(asked, memory, train.rows, k, world)
    near_by_query = dict(zip(gather_uneven(val.rows[own], world).tolist(), found.tolist(), strict=True))
    rows = [
        {
            "query": str(queries.root / queries.paths[int(q)]),
            "query_label": queries.classes[queries.labels[q]],
            "neighbours": [str(images.root / images.paths[int(i)]) for i in near],
            "neighbour_labels": [images.classes[images.labels[i]] for i in near],
        }
        for q, near in sorted(near_by_query.items())
    ]
    mapped = torch.isin(val.rows, evenly(val.total, MAP_IMAGES).to(val.rows.device))
    shown, labels = gather_uneven(val.values[mapped], world), gather_uneven(val.labels[mapped], world)
    if world.is_main:
        write_whole(run.neighbours, json.dumps(rows, indent=1).encode())
        tensors = {"components": principal_components(shown).cpu(), "labels": labels.cpu()}
        names = {"classes": json.dumps(queries.classes)}
        write_whole(run.map, safetensors.torch.save(tensors, metadata=names))


def _check_k(k: int, memory_size: int) -> None:
    if k > memory_size:
        raise UserError(f"neighbours: k = {k} is more than there are training images; {memory_size} is the most")
