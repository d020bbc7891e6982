"""Recording what a step launches, to launch all of it at once later: CUDA graphs, and what stands in for them on CPU.

    graphs.capture(body) -> replay        body reads and writes tensors whose addresses never change

Both may run `body` before they return, so it must be harmless to run. `EagerGraphs` keeps every body and runs it again
at each replay: whatever a CUDA graph would read from a static buffer it reads too, so that tests on CPU find a buffer
that was not filled, a padding row that writes where it should not, and a batch that takes the wrong graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

__all__ = ["CudaGraphs", "EagerGraphs", "GraphBackend", "Replay"]

Replay = Callable[[], None]


class GraphBackend(Protocol):
    """Where bodies are recorded."""

    def capture(self, body: Callable[[], None]) -> Replay:
        """Records `body`; what is returned does the same again with what its buffers hold by then."""
        ...


class EagerGraphs:
    """Runs the body at each replay.

    Attributes:
        num_captures, num_replays: so far.
    """

    def __init__(self) -> None:
        self.num_captures = 0
        self.num_replays = 0

    def capture(self, body: Callable[[], None]) -> Replay:
        """See `GraphBackend`."""
        self.num_captures += 1
        body()

        def replay() -> None:
            self.num_replays += 1
            body()

        return replay


class CudaGraphs:
    """CUDA graphs that share one pool of memory: they run one after the other, so none needs memory of its own.

    What a body leaves behind in tensors of its own may be overwritten by the next graph: results belong in static
    buffers. Replays go to the stream that is current then.
    """

    _WARM_UP_RUNS = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, body: Callable[[], None]) -> Replay:
        """See `GraphBackend`. Raises RuntimeError where `body` does what cannot be recorded, such as waiting."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # Libraries and kernels set themselves up at their first run, which cannot be recorded.
            for _ in range(self._WARM_UP_RUNS):
                body()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may use the GPU meanwhile (transports do).
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            body()
        replay: Replay = graph.replay
        return replay
