"""torch.compile, one block at a time.

The blocks of a model run the same code on other weights, so what is compiled for the first serves all: seconds, where
compiling the whole model takes minutes. Every length is dynamic, so no batch needs padding to a size that is known.
Norms, rotary positions, activations and additions fuse into few passes over memory; matrix products, attention and
LoRA stay the kernels they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from burnish.model.source import first_line


def compile_blocks(blocks: Iterable[nn.Module], try_out: Callable[[], None]) -> str:
    """Let each block be compiled, and `try_out` run them; → why they were left as they are, or "".

    Names, weights and hooks of the blocks stay as they were. What was compiled of another model is compiled again when
    it is called: to see whether it fits these blocks, it would read of them what they do not have.
    """
    blocks = list(blocks)
    # transformers 5.23 computes a block again inside what is compiled. That layers are handed x there, and let go of it
    # (fuse.SharedInput), need not be done again in the backward pass: its graph has the products themselves.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in blocks:
        block.compile(dynamic=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's compiler about itself
            try_out()
    except Exception as error:  # no compiler for the kernels, code that cannot be traced: what a model raises
        for block in blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
        return first_line(error)
    return ""


def why_in_pieces() -> str:
    """What cut the blocks that were compiled last into several graphs, or "": torch goes on without a word.

    Attention document by document, which a GPU has in float32 alone, is meant to stand between two.
    """
    counters = torch._dynamo.utils.counters
    reasons = list(counters["graph_break"])
    # A function may be left uncompiled, where those that it calls are not.
    if counters["frames"]["ok"] < counters["frames"]["total"]:
        reasons += counters["unimplemented"]
    for reason in reasons:
        if "_by_document" not in reason:
            context = reason.partition("Developer debug context:")[2].strip()
            return ": ".join(part.splitlines()[0] for part in (reason.strip(), context) if part)
    return ""


def uncompiled() -> AbstractContextManager[Any]:
    """Within it blocks run as they are written: compiled code does not call hooks."""
    return torch.compiler.set_stance("force_eager")
