"""The handover machines under every order of events that hypothesis finds: lost, late, twice, out of order, forged.

HandoverOverALossyChannel   both halves, tries of several prefill workers, restarts of both sides; `handover_world.py`
ReservationAlone            a reservation against senders that say anything
ShipmentAlone               a real `Shipment` on links of the test's own, against receivers that answer anything
"""

from __future__ import annotations

from handover_world import (
    LEASE_S,
    DecodeSide,
    Link,
    Try,
    World,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

INDEX = st.integers(0, 63)
# Mostly the next one.
PLACE = st.sampled_from([0, 0, 0, 0, 0, 1, 2, 7])
# Usual events before the next mishap: without some, nothing ever gets far.
CALM = st.integers(0, 12)
is_rough = precondition(lambda self: self.calm <= 0)


class HandoverOverALossyChannel(RuleBasedStateMachine):
    """One request from its reservation to its end, whatever happens."""

    world: World
    commands: list[tuple[str, int]]
    calm = 0

    @initialize(tensor_parallel=st.sampled_from([1, 1, 2]), early=st.booleans(), calm=CALM)
    def begin(self, tensor_parallel: int, early: bool, calm: int) -> None:
        self.calm = calm
        self.world = World()
        self.commands = []
        self.next_number = 1
        if early:
            self.world.tries.append(Try(self.world, 0, tensor_parallel))
        self.decode.decide(self.decode.remote.reserved())
        if not early:
            self.world.tries.append(Try(self.world, 0, tensor_parallel))

    @property
    def decode(self) -> DecodeSide:
        return self.world.decode

    def link(self, index: int) -> Link:
        halves = self.world.halves
        return halves[index % len(halves)].link

    # ---------------------------------------------------------------- the usual

    @rule(index=INDEX)
    def compute(self, index: int) -> None:
        self.calm -= 1
        self.world.tries[index % len(self.world.tries)].compute()

    @rule(index=INDEX, ok=st.sampled_from([True] * 19 + [False]))
    def end_staging(self, index: int, ok: bool) -> None:
        self.calm -= 1
        half = self.link(index).half
        if half.staging:
            half.end_staging(min(half.staging), ok)

    @rule(index=INDEX, place=PLACE, damaged=st.sampled_from([False] * 19 + [True]))
    def deliver_to_decode(self, index: int, place: int, damaged: bool) -> None:
        self.calm -= 1
        link = self.link(index)
        if link.to_decode:
            self.decode.take(link, link.to_decode.pop(place % len(link.to_decode)), damaged)

    @rule(index=INDEX, place=PLACE)
    def deliver_to_prefill(self, index: int, place: int) -> None:
        self.calm -= 1
        link = self.link(index)
        if link.to_prefill:
            link.half.take(link.to_prefill.pop(place % len(link.to_prefill)))

    @rule(index=INDEX, whole=st.booleans())
    def fetch(self, index: int, whole: bool) -> None:
        self.calm -= 1
        if not self.decode.jobs:
            return
        job = self.decode.jobs[index % len(self.decode.jobs)]
        if whole:
            self.decode.end_fetch(job)
        elif job.held.machine.is_open and not job.has_written:
            self.decode.write(job)

    @rule(rounds=st.integers(1, 6))
    def flow(self, rounds: int) -> None:
        """A time in which nothing goes wrong."""
        self.calm -= rounds
        for _ in range(rounds):
            while self.commands:
                self.deliver_command()
            for each in self.world.tries:
                each.compute()
            for half in self.world.halves:
                for seq in sorted(half.staging):
                    half.end_staging(seq, ok=True)
                while half.link.to_decode:
                    self.decode.take(half.link, half.link.to_decode.pop(0))
            for job in list(self.decode.jobs):
                self.decode.end_fetch(job)
            for half in self.world.halves:
                while half.link.to_prefill:
                    half.take(half.link.to_prefill.pop(0))

    @rule(index=INDEX)
    def renew(self, index: int) -> None:
        self.calm -= 1
        self.decode.renew(self.link(index))

    @rule()
    def time_goes_by(self) -> None:
        self.world.now_s += 3.0
        self.world.tick()

    # ---------------------------------------------------------------- what goes wrong

    @is_rough
    @rule(index=INDEX, place=INDEX, to_decode=st.booleans(), twice=st.booleans())
    def channel_loses_or_doubles(self, index: int, place: int, to_decode: bool, twice: bool) -> None:
        link = self.link(index)
        messages = link.to_decode if to_decode else link.to_prefill
        if messages:
            place %= len(messages)
            if twice:
                messages.insert(place, messages[place])
            else:
                del messages[place]

    @is_rough
    @rule(seconds=st.sampled_from([LEASE_S / 2, LEASE_S + 1, 61.0]), calm=CALM)
    def nothing_is_heard(self, seconds: float, calm: int) -> None:
        self.calm = calm
        self.world.now_s += seconds
        self.world.tick()

    @is_rough
    @rule(index=INDEX, there_first=st.booleans(), both=st.booleans(), calm=CALM)
    def link_breaks(self, index: int, there_first: bool, both: bool, calm: int) -> None:
        self.calm = calm
        link = self.link(index)
        if there_first or both:
            self.decode.lose_link(link)
        if not there_first or both:
            link.half.lose_link()

    @is_rough
    @rule(index=INDEX, calm=CALM)
    def prefill_dies(self, index: int, calm: int) -> None:
        self.calm = calm
        self.world.tries[index % len(self.world.tries)].crash()

    @precondition(lambda self: len(self.world.tries) < 5)
    @is_rough
    @rule(index=INDEX, tensor_parallel=st.sampled_from([1, 2]), calm=CALM)
    def stranger_behind_the_same_address(self, index: int, tensor_parallel: int, calm: int) -> None:
        """A new process takes the place of one that died and wants the same ticket."""
        self.calm = calm
        before = self.world.tries[index % len(self.world.tries)]
        before.crash()
        self.world.tries.append(Try(self.world, before.handover, tensor_parallel))

    @is_rough
    @rule(index=INDEX, calm=CALM)
    def prefill_gives_up(self, index: int, calm: int) -> None:
        self.calm = calm
        half = self.link(index).half
        if not half.is_dead:
            half.do(half.machine.aborted("given up"))

    # ---------------------------------------------------------------- the router

    @precondition(lambda self: len(self.world.tries) < 5)
    @is_rough
    @rule(tensor_parallel=st.sampled_from([1, 1, 2]), calm=CALM)
    def router_tries_another(self, tensor_parallel: int, calm: int) -> None:
        self.calm = calm
        self.world.tries.append(Try(self.world, self.next_number, tensor_parallel))
        self.commands.append(("prefill failed", self.next_number))
        self.next_number += 1

    @is_rough
    @rule(number=st.integers(0, 3), calm=CALM)
    def router_says(self, number: int, calm: int) -> None:
        """Nobody comes, or something that it has said before."""
        self.calm = calm
        if number < self.next_number:
            self.commands.append(("prefill failed again", number))

    @precondition(lambda self: self.commands)
    @rule()
    def command_comes(self) -> None:
        self.deliver_command()

    def deliver_command(self) -> None:
        reason, number = self.commands.pop(0)
        self.decode.decide(self.decode.remote.prefill_failed(reason, number))

    @precondition(lambda self: self.decode.word_due is not None)
    @rule()
    def no_word(self) -> None:
        due, self.decode.word_due = self.decode.word_due, None
        assert due is not None
        self.decode.decide(self.decode.remote.no_word(due))

    @is_rough
    @rule(what=st.sampled_from(["out of time", "client leaves", "decode restarts"]), calm=CALM)
    def it_all_ends(self, what: str, calm: int) -> None:
        self.calm = calm
        if what == "out of time":
            self.decode.decide(self.decode.remote.out_of_time("no pages came in time"))
        elif what == "client leaves":
            self.decode.decide(self.decode.remote.cancelled("the client left"))
        else:
            self.decode_restarts()

    def decode_restarts(self) -> None:
        """The process is gone with all it knew; senders learn it by their links, requests by their router."""
        for half in self.world.halves:
            half.link.is_up_there = False
            half.lose_link()
        self.world.decode = DecodeSide(self.world)
        self.decode.decide(self.decode.remote.reserved())
        self.commands, self.next_number = [], 1
        self.world.tries = [Try(self.world, 0, 1)]

    # ---------------------------------------------------------------- the promises

    @invariant()
    def promises_hold(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.quiesce()
        outcomes, phase = self.decode.outcomes, self.decode.remote.phase
        if phase == "LANDED":
            assert (outcomes["Land"], outcomes["PrefillHere"], outcomes["Release"]) == (1, 0, 0)
        elif phase == "LOCAL":
            assert (outcomes["Land"], outcomes["PrefillHere"], outcomes["Release"]) == (0, 1, 0)
        else:
            assert outcomes["Release"] == 1


TestHandoverOverALossyChannel = HandoverOverALossyChannel.TestCase
TestHandoverOverALossyChannel.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
