"""The registry's table: leases, incarnations, versions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.registry_state import RegistryState

A, B = b"a" * 16, b"b" * 16


def test_an_instance_stays_as_long_as_it_speaks() -> None:
    state: RegistryState[str] = RegistryState(lease_s=3)
    assert state.announce("decode-0", A, b"x", "first", now_s=0)
    assert state.expire(2.9) == []
    state.announce("decode-0", A, b"x", "second", now_s=2.9)
    assert state.expire(5.8) == []
    assert state.values() == {"decode-0": "second"}
    assert state.expire(5.9) == ["decode-0"]
    assert state.values() == {}


def test_the_version_moves_at_changes_only() -> None:
    state: RegistryState[int] = RegistryState(lease_s=3)
    state.announce("decode-0", A, b"x", 1, now_s=0)
    version = state.version
    state.announce("decode-0", A, b"x", 2, now_s=1)
    assert state.version == version
    assert state.values() == {"decode-0": 2}
    state.announce("decode-0", A, b"y", 2, now_s=1)
    assert state.version == version + 1
    state.expire(2)
    assert state.version == version + 1
    state.expire(9)
    assert state.version == version + 2


def test_a_replaced_incarnation_never_comes_back() -> None:
    state: RegistryState[str] = RegistryState(lease_s=3)
    state.announce("decode-0", A, b"x", "old", now_s=0)
    assert state.announce("decode-0", B, b"x", "new", now_s=1)
    version = state.version
    assert not state.announce("decode-0", A, b"x", "old", now_s=2)
    assert state.values() == {"decode-0": "new"}
    assert state.version == version


def test_a_removed_incarnation_never_comes_back_a_silent_one_may() -> None:
    state: RegistryState[str] = RegistryState(lease_s=3)
    state.announce("decode-0", A, b"x", "a", now_s=0)
    assert state.expire(3) == ["decode-0"]
    assert state.announce("decode-0", A, b"x", "a", now_s=4)
    assert state.remove("decode-0")
    assert not state.remove("decode-0")
    assert not state.announce("decode-0", A, b"x", "a", now_s=5)
    assert state.announce("decode-0", B, b"x", "b", now_s=5)


def test_who_is_silent_is_known_until_it_speaks_or_is_removed() -> None:
    state: RegistryState[str] = RegistryState(lease_s=3)
    for name in ("decode-0", "decode-1", "decode-2"):
        state.announce(name, A, b"x", "a", now_s=0)
    state.announce("decode-2", A, b"x", "a", now_s=2)
    state.expire(4)
    assert state.silent_for(10) == {"decode-0": 7, "decode-1": 7}
    state.announce("decode-0", A, b"x", "a", now_s=10)
    state.remove("decode-1")
    assert state.silent_for(11) == {}


events = st.lists(
    st.one_of(
        st.tuples(st.just("announce"), st.sampled_from("xyz"), st.sampled_from([A, B]), st.sampled_from([b"1", b"2"])),
        st.tuples(st.just("remove"), st.sampled_from("xyz")),
        st.tuples(st.just("wait"), st.floats(0, 5)),
    ),
    max_size=40,
)


@given(events)
def test_watchers_who_follow_the_version_miss_no_change(history: list[tuple[object, ...]]) -> None:
    state: RegistryState[tuple[bytes, bytes]] = RegistryState(lease_s=3)
    now_s, seen, view = 0.0, 0, {}
    for event in history:
        if event[0] == "announce":
            _, name, incarnation, content = event
            state.announce(name, incarnation, content, (incarnation, content), now_s)
        elif event[0] == "remove":
            state.remove(event[1])
        else:
            now_s += event[1]
            state.expire(now_s)
        assert state.version >= seen
        if state.version != seen:
            seen, view = state.version, state.values()
        assert view == state.values()
