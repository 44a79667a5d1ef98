"""Which process this is among its peers, and how peers are started. The only reader of the launcher's environment.

`torchrun`, `deepspeed` and `accelerate launch` start processes that find their place in RANK, LOCAL_RANK and
WORLD_SIZE. `burnish train` by itself starts torchrun where there is more than one GPU (`launch`).
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

SWITCHED_ON = ("1", "true", "y", "yes")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Processes on this machine; torchrun and DeepSpeed have each a name for it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())


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


def launch(words: Sequence[str], devices: int) -> None:
    """Become torchrun, which runs `burnish WORDS` in as many processes as there are devices. Does not return.

    NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR and MASTER_PORT say the same to `burnish train` as to LLaMA-Factory.
    """
    asked = os.environ.get
    nodes = asked("NNODES", "1")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", asked("NPROC_PER_NODE", str(devices))]
    if nodes == "1" and "MASTER_PORT" not in os.environ:
        command += ["--standalone"]
    else:
        command += ["--nnodes", nodes, "--node_rank", asked("NODE_RANK", "0")]
        command += ["--master_addr", asked("MASTER_ADDR", "127.0.0.1"), "--master_port", asked("MASTER_PORT", "29500")]
    here = str(Path(__file__).resolve().parents[1])  # burnish may be a checkout that is not installed
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, asked("PYTHONPATH")]))
    sys.stdout.flush()
    os.execv(sys.executable, [*command, "-m", "burnish", *words])
