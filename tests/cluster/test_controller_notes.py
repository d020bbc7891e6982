"""What the next controller knows of what was asked of the one before."""

from __future__ import annotations

from pathlib import Path

from baton.cluster.controller_notes import ControllerNotes


def test_what_was_written_is_read_by_the_next_controller_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "controller.json"
    assert ControllerNotes(path, "r1").held == frozenset()
    ControllerNotes(path, "r1").write({"decode-1", "decode-0"}, stopping=False)
    noted = ControllerNotes(path, "r1")
    assert (noted.held, noted.stopping) == ({"decode-0", "decode-1"}, False)
    noted.write((), stopping=True)
    noted = ControllerNotes(path, "r1")
    assert (noted.held, noted.stopping) == (frozenset(), True)
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o600


def test_every_controller_of_a_run_has_a_higher_generation(tmp_path: Path) -> None:
    path = tmp_path / "controller.json"
    assert [ControllerNotes(path, "r1").generation for _ in range(3)] == [1, 2, 3]
    assert [ControllerNotes(path, "r2").generation for _ in range(2)] == [1, 2]


def test_notes_of_another_run_are_none(tmp_path: Path) -> None:
    path = tmp_path / "controller.json"
    ControllerNotes(path, "r1").write({"decode-1"}, stopping=True)
    other = ControllerNotes(path, "r2")
    assert (other.held, other.stopping) == (frozenset(), False)


def test_damaged_notes_are_none(tmp_path: Path) -> None:
    path = tmp_path / "controller.json"
    for text in ("", "{", "[]", '{"run": "r1"}', '{"run": "r1", "held": 3, "stopping": false}'):
        path.write_text(text)
        assert ControllerNotes(path, "r1").held == frozenset()


def test_a_controller_goes_on_where_nothing_can_be_written(tmp_path: Path) -> None:
    notes = ControllerNotes(tmp_path / "missing" / "controller.json", "r1")
    notes.write({"decode-1"}, stopping=False)
    assert notes.held == {"decode-1"}
