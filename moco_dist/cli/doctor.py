"""`moco-dist doctor`."""

import os
from pathlib import Path

from moco_dist.cli.arguments import Parser, require_positive
from moco_dist.cli.configured import SCHEMAS, command_of, files_and_flags
from moco_dist.config.architectures import is_known_without_torch
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import leaf_fields, read_config, read_yaml
from moco_dist.errors import UserError

EXIT_ERRORS = 1
EVALUATIONS = ("linear", "finetune")
NOTHING_GIVEN = ["--run.dir", "runs/doctor", "--data.root", "data"]


def main(words: list[str]) -> int:
    """What is wrong with a machine, a config or a run; the exit status is 1 if there is an error among it."""
    parser = Parser(
        "moco-dist doctor",
        usage="moco-dist doctor [CONFIG.yaml ...] [options] [--section.key VALUE] | --run DIR",
        description="One line a finding, with what to do. Under torchrun it looks at every host, and compares clocks.",
    )  # fmt: skip
    parser.add_argument("--run", type=Path, metavar="DIR", help="read the log of this run instead")
    parser.add_argument("--nodes", type=int, help="this is one of so many hosts of the run; default: those here")
    parser.add_argument("--gpus-per-node", type=int, help="ranks on each of them; default: this host's GPUs")
    # Which command the config is of shows only when the words are parsed; settings of an evaluation have no section.
    args, rest = parser.parse_own(words, [name for command in EVALUATIONS for name in leaf_fields(SCHEMAS[command])])
    require_positive(args, "nodes", "gpus_per_node")
    is_planned = args.nodes is not None or args.gpus_per_node is not None

    if args.run is not None:
        if rest or is_planned:
            unexpected = repr(rest[0]) if rest else "--nodes or --gpus-per-node"
            raise UserError(f"unexpected argument {unexpected}; --run takes a folder alone")
        from moco_dist.doctor import logs

        return _print(logs.run(args.run))
    files, flags = files_and_flags(rest)
    command = command_of(files[0], flags) if files else "pretrain"
    if command not in ("pretrain", *EVALUATIONS):
        raise UserError(f"config file {files[0]} is one of moco-dist {command}; doctor looks at those of pretrain, "
                        f"{' and '.join(EVALUATIONS)}")  # fmt: skip
    if command in EVALUATIONS:
        if is_planned:
            raise UserError("--nodes and --gpus-per-node are of a pre-training; an evaluation is checked without them")
        needed = [] if "run_dir" in read_yaml(files[0]) else ["--run-dir", "runs/doctor"]
        from moco_dist.doctor import settings

        config = read_config(SCHEMAS[command], files[0], [*needed, *flags], files[1:])
        return _print(getattr(settings, command)(config))
    try:
        config = read_config(PretrainConfig, files[0] if files else None,
                             flags if files else [*NOTHING_GIVEN, *flags], files[1:])  # fmt: skip
    except UserError as error:
        from moco_dist.doctor import finding

        return _print([finding.problem("config", line) for line in str(error).splitlines()])
    if not is_known_without_torch(config.model.arch):
        from moco_dist.method.build import settled

        config = settled(config)
    from moco_dist.doctor import hosts

    found = hosts.findings(config, bool(files), args.nodes, args.gpus_per_node)
    return os.EX_OK if found is None else _print(found)


def _print(found: list) -> int:
    from moco_dist.doctor import finding

    print(finding.text(found))
    return EXIT_ERRORS if finding.is_error(found) else os.EX_OK
