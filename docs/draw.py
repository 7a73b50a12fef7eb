"""The documentation's pictures, drawn from the code and its settings: `python docs/draw.py` writes docs/pictures.

They are committed, because GitHub shows the pages as well. A test fails when a picture is no longer what the code does.
Each is 400 units wide, so that its letters can be read on a phone.
"""

import ast
import sys
import tomllib
from html import escape
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from moco_dist.config.pretrain import PretrainConfig  # noqa: E402
from moco_dist.config.source import read_config  # noqa: E402
from moco_dist.data.plan import Plan  # noqa: E402
from moco_dist.distributed.world import World  # noqa: E402
from moco_dist.method.queue import Queue  # noqa: E402
from moco_dist.report.charts import COLOURS  # noqa: E402

WIDTH = 400
INK, QUIET, LINE, CARD = "#1c1d1f", "#6a6d73", "#c9cbd0", "#f1f2f4"
BLUE, ORANGE, GREEN = COLOURS[:3]


def picture(title: str, height: float, parts: list[str]) -> str:
    """An SVG file on a ground of its own, so that it is read on light and dark pages."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{1.3 * WIDTH:g}" '
        f'height="{1.3 * height:g}" font-family="system-ui, sans-serif" font-size="11" fill="{INK}" role="img">',
        f"<title>{escape(title)}</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{QUIET}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height:g}" rx="6" fill="#ffffff"/>',
        *parts,
        "</svg>\n",
    ])  # fmt: skip


def text(
    x: float, y: float, words: str, *, anchor: str = "start", colour: str = INK, size: int = 11, more: str = ""
) -> str:
    style = f'text-anchor="{anchor}" fill="{colour}" font-size="{size}"{more}'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", more: str = "") -> str:
    return (f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" fill="{fill}" stroke="{stroke}"'
            f"{more}/>")  # fmt: skip


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<path d="M{x:g} {y:g} {to_x:g} {to_y:g}" stroke="{QUIET}" fill="none" marker-end="url(#tip)"/>'


def house() -> str:
    """Which room imports which: the layers of pyproject.toml, and the imports of every file."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rooms = [name.removeprefix("moco_dist.") for name in contracts[0]["layers"]]
    imports = {room: _imports_of(room, rooms) for room in rooms}
    left, top, cell = 88, 98, min(16, 290 / len(rooms))
    parts = [text(8, 16, "A dot: the room on the left imports from the room above the dot."),
             text(8, 31, "All dots lie right of the diagonal: imports point one way.", colour=QUIET)]  # fmt: skip
    for i, room in enumerate(rooms):
        x, y = left + (i + 0.5) * cell, top + (i + 0.5) * cell
        turned = f' transform="rotate(-65 {x:g} {top - 5:g})"'
        parts += [
            text(x, top - 5, room, more=turned, colour=QUIET),
            text(left - 8, y + 4, room, anchor="end"),
            f'<path d="M{left} {y:g}H{left + len(rooms) * cell:g}" stroke="{CARD}"/>',
            box(left + i * cell + 3, top + i * cell + 3, cell - 6, cell - 6, LINE),
        ]
    for i, room in enumerate(rooms):
        for j, other in enumerate(rooms):
            if other in imports[room]:
                where = f'cx="{left + (j + 0.5) * cell:g}" cy="{top + (i + 0.5) * cell:g}" r="4"'
                colour = BLUE if j > i else COLOURS[6]
                parts.append(f'<circle {where} fill="{colour}"><title>{room} imports {other}</title></circle>')
    return picture("Which room of moco_dist imports which", top + len(rooms) * cell + 10, parts)


def _imports_of(room: str, rooms: list[str]) -> set[str]:
    """The other rooms from which a file of `room` imports."""
    folder = ROOT / "moco_dist" / room
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    names = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
    parts = [name.split(".") for name in names]
    return {p[1] for p in parts if p[0] == "moco_dist" and len(p) > 1 and p[1] in rooms and p[1] != room}


def step() -> str:
    """One step of MoCo v2, with the numbers of the paper's config."""
    config = read_config(PretrainConfig, ROOT / "configs/mocov2_r50_200ep.yaml", ["--data.root", "x", "--run.dir", "x"])
    moco, batch = config.moco, config.optim.global_batch_size
    dim, arch = config.model.embedding_dim, config.model.arch
    parts: list[str] = []

    def labelled(x: float, y: float, width: float, first: str, second: str, colour: str = LINE) -> None:
        parts.extend([box(x, y, width, 38, CARD, colour), text(x + width / 2, y + 16, first, anchor="middle", size=12),
                      text(x + width / 2, y + 31, second, anchor="middle", colour=QUIET)])  # fmt: skip

    labelled(120, 8, 160, f"{batch} images", "no labels")
    parts += [arrow(160, 46, 96, 70), arrow(240, 46, 304, 70)]
    labelled(8, 70, 176, "view q", "a random crop, other colours", BLUE)
    labelled(216, 70, 176, "view k", "another crop, shuffled for BN", ORANGE)
    parts += [arrow(96, 108, 96, 134), arrow(304, 108, 304, 134)]
    labelled(8, 134, 176, f"query encoder, {arch}", "learns by its gradient", BLUE)
    labelled(216, 134, 176, f"key encoder, {arch}", "follows, without a gradient", ORANGE)
    parts += [arrow(184, 153, 216, 153),
              text(200, 191, f"key ← {moco.momentum:g} key + {1 - moco.momentum:.3g} query",
                   anchor="middle", colour=QUIET),
              arrow(96, 172, 96, 202), arrow(304, 172, 304, 202)]  # fmt: skip
    labelled(8, 202, 176, f"q: {batch} × {dim}", "of length 1", BLUE)
    labelled(216, 202, 176, f"k: {batch} × {dim}", "of length 1, back in order", ORANGE)
    parts += [arrow(96, 240, 96, 266), arrow(264, 240, 170, 266)]
    labelled(8, 266, 176, "loss: InfoNCE", f"is q nearer to its k? τ = {moco.temperature:g}", BLUE)
    labelled(216, 266, 176, f"queue: {moco.queue_size:,} keys", "of the steps before", ORANGE)
    parts += [arrow(216, 285, 184, 285), arrow(340, 240, 340, 266)]
    parts += [text(8, 322, "After the loss: the gradient moves the query encoder; the"),
              text(8, 337, f"{batch} keys replace the oldest of the queue.")]  # fmt: skip
    return picture("One step of MoCo v2", 346, parts)


def shuffled_bn() -> str:
    """The key permutation of a small batch, as `Plan` computes it."""
    batch, block, group = 32, 16, 4
    order = Plan(num_samples=batch, global_batch_size=batch, seed=0, block_size=block).key_permutation(0)
    side, left = 11.6, 14
    parts = [text(left, 16, f"Queries: {batch} samples in BN groups of {group} (a colour each)")]
    upper, lower = 24, 124

    def centre(i: int) -> float:
        return left + (i + 0.5) * side

    for i in range(batch):
        sample = int(order[i])
        colour, of_key = COLOURS[i // group], COLOURS[sample // group]
        parts += [box(left + i * side + 0.6, upper, side - 1.2, 14, colour),
                  box(left + i * side + 0.6, lower, side - 1.2, 14, of_key),
                  f'<path d="M{centre(sample):g} {upper + 15} {centre(i):g} {lower - 1}" stroke="{of_key}" '
                  'stroke-opacity="0.7" fill="none"/>']  # fmt: skip
    for start in range(0, batch, group):
        x = left + start * side
        parts.append(f'<path d="M{x + 1.5:g} {lower + 17}v4h{group * side - 3:g}v-4" stroke="{INK}" fill="none"/>')
    parts.append(f'<path d="M{left + block * side:g} 20V154" stroke="{QUIET}" stroke-dasharray="3 3"/>')
    parts += [
        text(left, 160, "Keys: each bracket is one BN group, of samples of several colours."),
        text(left, 176, f"A block of {block} is shuffled in itself. Here rank 0 holds the left one", colour=QUIET),
        text(left, 190, "and rank 1 the right one, so no image is sent.", colour=QUIET),
    ]
    return picture("Shuffled BN: keys are normalised in other groups than queries", 200, parts)


def queue() -> str:
    """What the shards hold after each step: the rows that `Queue.enqueue` has written."""
    size, batch, ranks, steps = 24, 8, 4, 5
    worlds = [World(rank, rank, ranks, ranks) for rank in range(ranks)]
    shards = [Queue(size, 1, 0, world) for world in worlds]
    for shard in shards:
        shard.keys.zero_()  # a row's number is the step that wrote it
    side, left, top = 12.5, 66, 46
    parts = [text(8, 16, f"A queue of {size} keys on {ranks} ranks; {batch} keys a step, oldest first out.")]
    parts += [text(left + (rank + 0.5) * size / ranks * side, 36, f"rank {rank}", anchor="middle", colour=QUIET)
              for rank in range(ranks)]  # fmt: skip
    for number in range(steps):
        y = top + number * 24
        if number:
            for shard in shards:
                shard.enqueue(torch.full((batch, 1), float(number)))
        parts.append(text(8, y + 12, f"step {number}" if number else "start"))
        row = 0
        for rank, shard in enumerate(shards):
            for written in shard.keys[:, 0].int().tolist():
                colour = COLOURS[written - 1] if written else CARD
                shade = "" if written in (0, number) else ' fill-opacity="0.45"'
                parts.append(box(left + row * side + 0.6 + rank * 3, y, side - 1.2, 16, colour, LINE, shade))
                row += 1
        at = left + int(shards[0].ptr) * side + int(shards[0].ptr) // (size // ranks) * 3
        parts.append(f'<path d="M{at:g} {y + 17}l-4 6h8z" fill="{INK}"/>')
    y = top + steps * 24 + 12
    parts += [
        text(8, y, "Gray: random keys of the start. A colour: the keys of one step."),
        text(8, y + 15, "▲ where the next key goes. A batch may lie on several ranks.", colour=QUIET),
    ]
    return picture("The queue's shards", y + 24, parts)


def kill() -> str:
    """Which samples each step uses, before a kill and after it on another number of ranks, as `Plan` computes it."""
    batch, saved, killed, last = 8, 3, 5, 8
    plan = Plan(num_samples=32, global_batch_size=batch, seed=0)
    parts = [text(8, 16, f"Each cell: the numbers of the images of a step (batch {batch}, 32 images).")]
    side, left, height = 40, 62, 40

    def row(y: float, name: str, ranks: int, first: int, end: int) -> None:
        parts.append(text(8, y + 14, name))
        parts.append(text(8, y + 28, f"{ranks} ranks", colour=QUIET))
        worlds = [World(rank, rank, ranks, ranks) for rank in range(ranks)]
        for number in range(first, end):
            x = left + number * side
            lost = name == "killed" and number >= saved
            parts.append(box(x + 1, y, side - 2, height, CARD, LINE, ' stroke-dasharray="3 2"' if lost else ""))
            for rank, world in enumerate(worlds):
                for i, sample in enumerate(plan.query_indices(number, world).tolist()):
                    at = rank * batch // ranks + i
                    place = x + 12 + at % 2 * 16, y + 9.5 + at // 2 * 9.4
                    parts.append(text(*place, str(sample), anchor="middle", size=9, colour=COLOURS[rank]))

    for number in range(last):
        parts.append(text(left + (number + 0.5) * side, 34, f"step {number}", anchor="middle", colour=QUIET, size=10))
    row(42, "killed", 2, 0, killed)
    row(100, "goes on", 4, saved, last)
    at = left + saved * side
    parts += [
        f'<path d="M{at} 38V152" stroke="{GREEN}" stroke-width="2"/>',
        text(at - 4, 96, "checkpoint", anchor="end", colour=GREEN),
        text(left + killed * side + 4, 66, "SIGKILL", colour=COLOURS[6]),
        text(8, 166, "A colour is a rank. The steps since the checkpoint are done again"),
        text(8, 181, "with the same images, crops and colours, on any number of ranks."),
    ]
    return picture("What happens at a kill", 190, parts)


PICTURES = {"house": house, "step": step, "shuffled_bn": shuffled_bn, "queue": queue, "kill": kill}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (Path(__file__).parent / "pictures" / f"{name}.svg").write_text(draw(), encoding="utf-8")
