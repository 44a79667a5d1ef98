"""Which process this is among its peers, and how peers are started. The only reader of the launcher's environment.

`torchrun`, `deepspeed` and `accelerate launch` start processes that find their place in RANK, LOCAL_RANK and
WORLD_SIZE. `burnish train` by itself starts torchrun where there is more than one GPU (`launch`).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

SWITCHED_ON = ("1", "true", "y", "yes")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def master_port() -> str:
    """Where the processes meet."""
    return os.environ.get("MASTER_PORT", "")


def is_main() -> bool:
    """The one process that prints and writes the run's files."""
    return rank() == 0


def is_local_main() -> bool:
    """One process on each machine."""
    return local_rank() == 0


def launched() -> bool:
    """Whether a launcher started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def be_the_only_one() -> None:
    """A run of one process, for libraries that want a launcher's variables all the same (DeepSpeed)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))


def forced_launch() -> bool:
    """Whether torchrun is asked for whatever devices there are; NPROC_PER_NODE then says how many processes."""
    return os.environ.get("FORCE_TORCHRUN", "").lower() in SWITCHED_ON


def launch(words: Sequence[str], devices: int) -> NoReturn:
    """Be torchrun, which runs `burnish WORDS` in as many processes as there are devices, and exit as they do.

    NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR and MASTER_PORT say the same to `burnish train` as to LLaMA-Factory.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # a process of the run has told what ended it
            logging.getLogger(name).setLevel(logging.CRITICAL)
    for name, value in environment(devices).items():
        os.environ.setdefault(name, value)
    here = str(Path(__file__).resolve().parents[1])  # burnish may be a checkout that is not installed
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    sys.stdout.flush()
    try:
        torchrun([*_torchruns_words(devices), "-m", "burnish", *words])
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode >= 0:
            raise SystemExit(failure.exitcode) from None
        print(f"process {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        raise SystemExit(128 - failure.exitcode) from None
    raise SystemExit(0)


def _torchruns_words(devices: int) -> list[str]:
    asked = os.environ.get
    nodes = asked("NNODES", "1")
    command = ["--nproc_per_node", asked("NPROC_PER_NODE", str(devices))]
    if nodes == "1" and "MASTER_PORT" not in os.environ:
        return [*command, "--standalone"]
    command += ["--nnodes", nodes, "--node_rank", asked("NODE_RANK", "0")]
    command += ["--master_addr", asked("MASTER_ADDR", "127.0.0.1"), "--master_port", asked("MASTER_PORT", "29500")]
    return command


def environment(devices: int) -> dict[str, str]:
    """What torchrun else sets too low: one thread a process, and 30 seconds to write a checkpoint after a signal."""
    asked = os.environ.get("NPROC_PER_NODE", "")
    processes = int(asked) if asked.isdecimal() else devices
    threads = max((os.cpu_count() or 1) // max(processes, 1), 1)
    return {"OMP_NUM_THREADS": str(threads), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
