"""The network between simulated processes: what `grpc.aio.insecure_channel` and `grpc.aio.server` give there.

A channel has one connection at a time, as TCP gives it: bytes come in order or the connection breaks, and then every
call on it ends with UNAVAILABLE on both sides. Messages are serialised, take their time, and are held back while the
path is cut; when the path comes back they arrive (TCP sends again), unless the cut lasted so long that the system gave
the connection up. The kernel of a stopped process still takes messages in; a dead process's kernel resets its
connections, unless the whole host has vanished.

    client process          Connection                                     server process
    Call ── open, requests, end, cancel ──> delay, hold, break ──> ServerCall
         <── replies, status ────────────────────────────────────
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.simulation.process import Process
from tests.simulation.world import World

__all__ = ["Connection", "Network", "Path", "Server"]

_GIVE_UP_S = 20.0
_KEEPALIVE_S = 15.0
_RECONNECT_S = 0.1


@dataclass(slots=True)
class Path:
    """How messages travel from one process to another.

    Attributes:
        delay_s: at least.
        jitter_s: and up to so much more.
        spike: chance of a message that takes a hundred times as long, at most 0.3 s.
        is_cut: they are held back.
        seconds_per_byte: of a slow link.
    """

    delay_s: float = 100e-6
    jitter_s: float = 300e-6
    spike: float = 0.0
    is_cut: bool = False
    seconds_per_byte: float = 0.0


class Network:
    """All servers and connections.

    Attributes:
        servers: by address.
        on_message: told (source, destination, call path, message) before one is sent; may answer "drop", "duplicate" or
            "break".
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.servers: dict[str, Server] = {}
        self.connections: set[Connection] = set()
        self._order: dict[Connection, int] = {}
        self.on_message: Callable[[str, str, str, Any], str] | None = None
        self._paths: dict[tuple[str, str], Path] = {}
        self._next_port = 21_000
        self._num_connections = 0
        self.make_path: Callable[[], Path] = Path

    def path(self, source: str, destination: str) -> Path:
        """From one process to another, whatever its incarnation."""
        found = self._paths.get((source, destination))
        if found is None:
            found = self._paths[source, destination] = self.make_path()
        return found

    def cut(self, source: str, destination: str) -> None:
        """Hold back everything on this path."""
        self.path(source, destination).is_cut = True

    def mend(self, source: str, destination: str) -> None:
        """Let it through again."""
        self.path(source, destination).is_cut = False
        for connection in self.list_connections():
            connection.release_held()

    def list_connections(self) -> list[Connection]:
        """In the order in which they were made."""
        return sorted(self.connections, key=self._order.__getitem__)

    def add(self, connection: Connection) -> None:
        """A new one."""
        self._num_connections += 1
        self._order[connection] = self._num_connections
        self.connections.add(connection)

    def remove(self, connection: Connection) -> None:
        """It has broken."""
        self.connections.discard(connection)
        self._order.pop(connection, None)

    def listen(self, server: Server, port: int) -> int:
        """A port for a server; RuntimeError where it is taken."""
        if not port:
            self._next_port += 1
            port = self._next_port
        address = f"127.0.0.1:{port}"
        taken = self.servers.get(address)
        if taken is not None and not taken.process.is_dead:
            raise RuntimeError(f"port {port} is taken")
        self.servers[address] = server
        return port


class Connection:
    """One TCP connection from a client process to whoever listens at the address when it is made.

    Attributes:
        server: who accepted it; None while it is being made.
        is_broken: for good.
        is_silent: one end has vanished and the other does not know.
    """

    def __init__(self, network: Network, client: Process, address: str) -> None:
        self.network = network
        self.world = network.world
        self.client = client
        self.address = address
        self.server: Server | None = None
        self.is_broken = False
        self.is_silent = False
        self.calls: list[Any] = []
        target = network.servers.get(address)
        self.server_name = "nowhere" if target is None else target.process.name
        self._random = network.world.random(f"connection {client.name} {address} {network.world.now_s:.9f}")
        self._last_s = [0.0, 0.0]
        self._on_the_way: tuple[deque[Callable[[], None]], deque[Callable[[], None]]] = (deque(), deque())
        self._num_held = [0, 0]
        self._waiting: list[Callable[[], None]] = []
        network.add(self)
        client.on_death.append(self._client_died)
        self.send(True, 60, self._accept)

    # ---------------------------------------------------------------- set-up and end

    def _accept(self) -> None:
        server = self.network.servers.get(self.address)
        if server is None or server.process.is_dead or not server.is_open:
            self.send(False, 40, lambda: self.break_off("connection refused"))
            return
        self.server = server
        self.server_name = server.process.name
        server.connections.append(self)
        server.process.on_death.append(self._server_died)
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call()

    def when_accepted(self, call: Callable[[], None]) -> None:
        """Now, or when the server has accepted."""
        if self.server is not None:
            call()
        else:
            self._waiting.append(call)

    def _client_died(self) -> None:
        self._reset(from_client=True)

    def _server_died(self) -> None:
        self._reset(from_client=False)

    def _reset(self, *, from_client: bool) -> None:
        """The kernel of a dead process says so to the other side."""
        if not self.is_broken and not self.is_silent:
            self.send(from_client, 40, lambda: self.break_off("connection reset by peer"))

    def fall_silent(self) -> None:
        """One of the two hosts has vanished: nothing comes any more, which is noticed late."""
        self.is_silent = True
        self.world.after(_KEEPALIVE_S, lambda: self.break_off("keepalive watchdog timeout"))

    def break_off(self, why: str) -> None:
        """Every call on it fails, on both sides."""
        if self.is_broken:
            return
        self.is_broken = True
        self.network.remove(self)
        if self.server is not None and self in self.server.connections:
            self.server.connections.remove(self)
        for process, died in (
            (self.client, self._client_died),
            (None if self.server is None else self.server.process, self._server_died),
        ):
            if process is not None and died in process.on_death:
                process.on_death.remove(died)
        calls, self.calls = self.calls, []
        for call in calls:
            call.connection_broke(why)

    # ---------------------------------------------------------------- messages

    def send(self, to_server: bool, num_bytes: int, arrive: Callable[[], None]) -> None:
        """Something travels; `arrive` is called at the other end, in order, if the connection lives then."""
        if self.is_broken:
            return
        path = self._path(to_server)
        chance = self._random.random
        delay_s = path.delay_s + path.jitter_s * chance() + path.seconds_per_byte * num_bytes
        if path.spike and chance() < path.spike:
            delay_s = max(delay_s, min(100 * delay_s, 0.3))
        time_s = max(self._last_s[to_server] + 1e-7, self.world.now_s + delay_s)
        self._last_s[to_server] = time_s
        self._on_the_way[to_server].append(arrive)
        self.world.at(time_s, lambda: self._arrive(to_server))

    def _path(self, to_server: bool) -> Path:
        names = (self.client.name, self.server_name)
        return self.network.path(*(names if to_server else names[::-1]))

    def _arrive(self, to_server: bool) -> None:
        """The time of one more message has come: the first that is on its way."""
        if self.is_broken or self.is_silent:
            return
        if self._path(to_server).is_cut:
            self._num_held[to_server] += 1
            if self._num_held[to_server] == 1:
                first = self._on_the_way[to_server][0]
                self.world.after(_GIVE_UP_S, lambda: self._give_up(to_server, first))
            return
        self._on_the_way[to_server].popleft()()

    def _give_up(self, to_server: bool, first: Callable[[], None]) -> None:
        if self._num_held[to_server] and self._on_the_way[to_server][0] is first:
            self.break_off("connection timed out")

    def release_held(self) -> None:
        """The path may be whole again: what was held comes now."""
        for to_server in (True, False):
            if self._num_held[to_server] and not self._path(to_server).is_cut:
                num_held, self._num_held[to_server] = self._num_held[to_server], 0
                for number in range(num_held):
                    self.world.after(1e-3 + number * 1e-6, lambda to_server=to_server: self._arrive(to_server))  # type: ignore[misc]


class Server:
    """`grpc.aio.Server`."""

    def __init__(self, network: Network, process: Process) -> None:
        self.network = network
        self.process = process
        self.is_open = False
        self.connections: list[Connection] = []
        self.calls: set[Any] = set()
        self._handlers: dict[str, Any] = {}
        self._address = ""

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The registered ones are the same."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """A service's methods."""
        for method, handler in handlers.items():
            self._handlers[f"/{service}/{method}"] = handler

    def handler(self, method: str) -> Any:
        """Of a method, None where it is not served."""
        return self._handlers.get(method)

    def add_insecure_port(self, address: str) -> int:
        """A port; 0 takes a free one."""
        host, _, port = address.rpartition(":")
        bound = self.network.listen(self, int(port))
        self._address = f"{host}:{bound}"
        return bound

    async def start(self) -> None:
        """Accept connections."""
        self.is_open = True

    async def stop(self, grace: float | None) -> None:
        """Accept no more, let calls end within the grace, cancel the others, close the connections."""
        self.is_open = False
        if self.network.servers.get(self._address) is self:
            del self.network.servers[self._address]
        tasks = [call.task for call in list(self.calls) if call.task is not None]
        if tasks and grace:
            await asyncio.wait(tasks, timeout=grace)
        for call in list(self.calls):
            call.cancel()
        await asyncio.sleep(0)
        for connection in list(self.connections):
            connection.send(False, 40, lambda connection=connection: connection.break_off("the server has stopped"))  # type: ignore[misc]

    async def wait_for_termination(self, timeout: float | None = None) -> bool:
        """Never, but cancelled."""
        await asyncio.sleep(timeout or 1e9)
        return False
