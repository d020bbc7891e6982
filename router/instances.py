"""The router's live view of the workers: pure. Fed by registry lists, load reports and this router's own choices.

    registry list  -> apply()          who is there, in which incarnation and state
    load reports   -> load             decode events, news of prefill workers, and their replies
    own dispatches -> begin_*/end_*    load that no report shows yet

The last view stays when the registry is away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.routing.facts import InstanceView

__all__ = ["Instance", "InstanceTable", "PendingLoad"]

_DEFAULT_BLOCK_SIZE = 16


@dataclass(slots=True)
class PendingLoad:
    """Requests on their way to a worker that no report of its shows yet."""

    requests: int = 0
    prefill_tokens: int = 0

    def add(self, *, prefill_tokens: int) -> Callable[[], None]:
        """One more request; call what is returned once it is to count no more."""
        self.requests += 1
        self.prefill_tokens += prefill_tokens

        def end() -> None:
            self.requests -= 1
            self.prefill_tokens -= prefill_tokens

        return end


@dataclass(slots=True, eq=False)
class Instance:
    """One worker process. A new incarnation under the same id is a new `Instance`.

    Attributes:
        status: as last announced.
        load: the newest of announced and reported load.
        connected: whether the router can talk to it (for decode: the token stream stands).
        listed: whether the registry's last list named it.
        welcomes: how often its token stream has come up.
        looked_up_tokens, hit_tokens: of prompts that this router had read there, and of these what its cache held.
        is_followed: a prefill worker tells its load as it changes, see `follow.py`.
        others: what other routers have just sent there, see `peers.py`.
    """

    status: pb.WorkerStatus
    load: pb.WorkerLoad = field(default_factory=pb.WorkerLoad)
    connected: bool = False
    listed: bool = True
    welcomes: int = 0
    is_followed: bool = False
    others: PendingLoad = field(default_factory=PendingLoad)
    own_requests: int = 0
    own_prefill_tokens: int = 0
    looked_up_tokens: int = 0
    hit_tokens: int = 0

    @property
    def instance_id(self) -> str:
        """Name within the cluster."""
        return self.status.instance_id

    @property
    def block_size(self) -> int:
        """Tokens per KV block."""
        return self.status.layout.block_size or _DEFAULT_BLOCK_SIZE

    def begin(self, prefill_tokens: int) -> None:
        """This router sends a request here, `prefill_tokens` of which it has to compute."""
        self.own_requests += 1
        self.own_prefill_tokens += prefill_tokens

    def prefill_done(self, prefill_tokens: int) -> None:
        """The prompt is computed."""
        self.own_prefill_tokens -= prefill_tokens
        assert self.own_prefill_tokens >= 0, self.instance_id

    def prompt_read(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A prompt was read here, `cached_tokens` of it from the cache."""
        self.looked_up_tokens += prompt_tokens
        self.hit_tokens += cached_tokens

    def end(self) -> None:
        """The request is over."""
        self.own_requests -= 1
        assert self.own_requests >= 0, self.instance_id
        if self.own_requests == 0 and self.status.role == "prefill" and not self.is_followed:
            # Then it reports only with its replies; the last one was written before this request had left.
            idle = pb.WorkerLoad()
            idle.CopyFrom(self.load)
            idle.running_requests = idle.waiting_requests = idle.pending_prefill_tokens = 0
            self.load = idle

    def view(self) -> InstanceView:
        """A frozen copy for the policy."""
        load = self.load
        return InstanceView(
            instance_id=self.instance_id,
            role=self.status.role,
            state=self.status.state,
            connected=self.connected,
            block_size=self.block_size,
            running_requests=load.running_requests,
            waiting_requests=load.waiting_requests,
            kv_blocks_total=load.kv_blocks_total,
            kv_blocks_free=load.kv_blocks_free,
            kv_blocks_cached=load.kv_blocks_cached,
            pending_prefill_tokens=load.pending_prefill_tokens,
            max_running_requests=load.max_running_requests,
            context_tokens=load.context_tokens,
            max_remaining_tokens=load.max_remaining_tokens,
            preemptions=load.preemptions,
            slowness=load.slowness,
            host_id=self.status.host_id,
            lends_cores=self.status.lends_cores,
            own_requests=self.own_requests + self.others.requests,
            own_prefill_tokens=self.own_prefill_tokens + self.others.prefill_tokens,
        )


class InstanceTable:
    """All workers this router knows, by id."""

    def __init__(self) -> None:
        self._instances: dict[str, Instance] = {}

    def get(self, instance_id: str) -> Instance | None:
        """The present incarnation under this id."""
        return self._instances.get(instance_id)

    def all(self) -> list[Instance]:
        """Every known worker."""
        return list(self._instances.values())

    def views(self) -> list[InstanceView]:
        """Frozen copies for the policy."""
        return [instance.view() for instance in self._instances.values()]

    def apply(self, statuses: Iterable[pb.WorkerStatus]) -> None:
        """Take over the cluster's full list (see `view_merge.py`); then `prune`.

        A decode worker that the list no longer names stays while its stream stands: that is better evidence of life
        than any list. A status that is given again, the same object, says nothing new about the load.
        """
        for instance in self._instances.values():
            instance.listed = False
        for status in statuses:
            if status.role not in ("prefill", "decode") or status.state == "dead":
                continue
            known = self._instances.get(status.instance_id)
            if known is not None and not status.incarnation and known.status.incarnation:
                continue  # somebody speaks for an instance that has not announced itself there
            if known is not None and known.status.incarnation == status.incarnation:
                is_fresh = known.status is not status
                known.status, known.listed = status, True
                if is_fresh and not (known.is_followed or (known.connected and status.role == "decode")):
                    known.load = status.load
            else:
                # A prefill worker is called anew for each request: there is no stream that could be down.
                connected = status.role == "prefill"
                fresh = Instance(status=status, load=status.load, connected=connected)
                self._instances[status.instance_id] = fresh

    def prune(self) -> list[Instance]:
        """Drop and return the workers that are neither listed nor connected by a stream."""
        gone = [
            instance
            for instance in self._instances.values()
            if not instance.listed and not (instance.connected and instance.status.role == "decode")
        ]
        for instance in gone:
            del self._instances[instance.instance_id]
        return gone
