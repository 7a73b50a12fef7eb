"""torchrun on this machine, ending in one line instead of its traceback."""

import logging

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

INTERRUPTED = 130


def torchrun(num_ranks: int, command: list[str]) -> int:
    """Run `moco-dist COMMAND` on `num_ranks` processes of this machine; returns its exit status.

    The same as `torchrun --standalone --nproc-per-node NUM_RANKS -m moco_dist COMMAND`.
    """
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)  # the ranks speak for themselves
    words = ["--standalone", "--nproc-per-node", str(num_ranks), "-m", "moco_dist", *command]
    try:
        run(get_args_parser().parse_args(words))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except (SignalException, KeyboardInterrupt):
        return INTERRUPTED
    return 0
