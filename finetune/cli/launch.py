"""torchrun without its traceback: what a process of the run says is all that is said."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from finetune.errors import ConfigError

MOST = 1024
"""Processes of one machine; it has fewer GPUs and cores."""
KILLED = 128
"""Exit codes above say the signal that ended a process."""


def launch(processes: str, words: Sequence[str]) -> int:
    """Starts the processes of a run on this machine and returns the exit code of the run.

    Args:
        processes: How many; `gpu` is one for every GPU, or one process without any.
        words: Options of torchrun, then the configuration and its overrides.
    """
    place = next((i for i, word in enumerate(words) if word.endswith((".yaml", ".yml"))), None)
    if place is None:
        raise ConfigError("finetune launch: name the YAML file of the run")
    if processes.removeprefix("-").isdecimal() and not 1 <= int(processes) <= MOST:
        raise ConfigError(f"--processes must be from 1 to {MOST}, or gpu; got {processes}")
    options, command = list(words[:place]), list(words[place:])
    if not any(option.startswith(("--nnodes", "--rdzv", "--master")) for option in options):
        # By its own name a machine may have no address, as in some containers; torchrun then waits for minutes.
        options += ["--standalone", "--local-addr=127.0.0.1"]
    from torch import cuda
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    number = str(max(cuda.device_count(), 1)) if processes == "gpu" else processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own default, without its warning
    # torch's launcher lists the processes that it ends as warnings and errors of its own.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main([f"--nproc-per-node={number}", *options, "-m", "finetune", "train", *command])
    except ChildFailedError as error:
        code = int(error.get_first_failure()[1].exitcode)
        return code if code >= 0 else KILLED - code
    except SystemExit as error:  # what argparse of torchrun says about its options
        return error.code if isinstance(error.code, int) else int(bool(error.code))
    except ValueError as error:
        raise ConfigError(f"torchrun: {error}; see torchrun --help") from None
    sys.stdout.flush()
    return 0
