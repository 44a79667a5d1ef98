"""The recorder of graphs.py on a CUDA device: what it takes to record there, and to leave off where that fails."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from burnish.model.graphs import CannotRecord


class CudaRecorder:
    """CUDA graphs that share one pool of memory: a recorded pass is over, forward and backward, before another begins.

    Only this thread's calls are watched while it records ("thread_local"): others may load data and talk to peers.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # not the default one, which cannot be recorded
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._broken: list[torch.cuda.CUDAGraph] = []  # torch's allocator may hold pointers to them

    def rehearse(self, work: Callable[[], None]) -> None:
        """On the usual stream, where gradients that are missing belong; then aside, so that what libraries allocate for
        a stream is there before it is recorded; then with an error where the CPU would wait for the device."""
        state = torch.cuda.get_rng_state()
        try:
            work()
            with self._aside():
                work()
                with _no_waiting():
                    work()
            if not torch.equal(state, torch.cuda.get_rng_state()):
                raise CannotRecord("it draws random numbers")
        finally:
            torch.cuda.set_rng_state(state)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        gc.collect(1)  # an autograd node of an earlier pass would be of another stream
        torch.cuda.synchronize()
        free, _ = torch.cuda.mem_get_info()
        if free < torch.cuda.memory_reserved():  # while it records torch's allocator gives nothing back
            torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with self._aside(), _no_collecting():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        self._graphs.append(graph)
        return graph.replay

    def forget(self) -> None:
        torch.cuda.synchronize()
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()  # torch makes a pool that was given up no second time
        torch.cuda.empty_cache()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        usual = torch.cuda.current_stream()
        self._stream.wait_stream(usual)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            usual.wait_stream(self._stream)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a recording that failed. One that CUDA itself has ended leaves torch in the middle of it: its allocator
        still serves the recording, and its generator of random numbers counts for it until another one has ended."""
        with suppress(RuntimeError):
            graph.capture_end()
        try:
            graph.pool()  # raises where the recording was not ended as it should
        except RuntimeError:
            self._broken.append(graph)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
                torch._C._cuda_releasePool(torch.cuda.current_device(), self._pool)
            with suppress(RuntimeError):
                another = torch.cuda.CUDAGraph()
                self._broken.append(another)
                another.capture_begin(capture_error_mode="thread_local")
                torch.zeros(1, device="cuda")
                another.capture_end()
        else:
            graph.reset()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Within it an operation for which the CPU waits raises CannotRecord."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise CannotRecord("the CPU waits in them for values that the GPU computes") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _no_collecting() -> Iterator[None]:
    """What Python would free of its own accord might be the device's, which it must not touch now."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
