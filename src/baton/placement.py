"""Where one process stands in its instance: what a launcher tells each rank that it starts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Placement"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One rank's place.

    Attributes:
        instance_id: "prefill-0".
        start_id: drawn by the launcher for each start of the instance, the same for all ranks of that start: a rank
            that is left over from an earlier start is a stranger.
        rank: `stage * tensor_parallel + tensor_rank`, below `num_ranks`.
        num_ranks: processes of the instance, tensor_parallel * pipeline_parallel.
        host: address of this rank's host: it listens there, and ranks on other hosts reach it there.
    """

    instance_id: str
    start_id: str = ""
    rank: int = 0
    num_ranks: int = 1
    host: str = "127.0.0.1"

    @property
    def index(self) -> int:
        """The instance's number within its role."""
        return int(self.instance_id.rpartition("-")[2])

    @property
    def name(self) -> str:
        """For logs: the instance, and the rank where there are several."""
        return self.instance_id if self.num_ranks == 1 else f"{self.instance_id}/rank{self.rank}"
