"""Ranks that were started with different settings are told so before they train."""

import json
from typing import Any

from moco_dist.distributed.collectives import gather_texts
from moco_dist.distributed.world import World
from moco_dist.errors import UserError


def require_agreement(facts: dict[str, Any], world: World) -> None:
    """Compare `facts` (plain JSON values) over ranks. Called by all ranks.

    Raises:
        UserError: on every rank, naming each fact that differs, its values and the ranks that hold them.
    """
    everyone = [json.loads(text) for text in gather_texts(json.dumps(facts), world)]
    problems = []
    for name in sorted(set().union(*everyone)):
        ranks_of: dict[str, list[int]] = {}
        for rank, theirs in enumerate(everyone):
            ranks_of.setdefault(json.dumps(theirs.get(name)), []).append(rank)
        if len(ranks_of) > 1:
            held = "; ".join(f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in ranks_of.items())
            problems.append(f"ranks disagree on {name}: {held}")
    if problems:
        raise UserError("\n".join(problems))
