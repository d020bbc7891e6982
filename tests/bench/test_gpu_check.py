"""make gpu-check: stages that fail, hang or lack something, what they mean for the exit status and for speeds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import gpu_check
import gpu_packages
from gpu_check import Stage

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "OUT", tmp_path / "out")
    (tmp_path / "out").mkdir()


def stage(code: str, *, bit: int = 1, limit_s: float = 60.0, needs: tuple[str, ...] = ()) -> Stage:
    return Stage(f"stage{bit}", bit, limit_s, [sys.executable, "-c", code], needs)


def report(*cases: tuple[str, str, bool]) -> str:
    lines = [
        f'<testcase classname="{where}" name="{name}">{"<failure/>" if failed else ""}</testcase>'
        for where, name, failed in cases
    ]
    return f"<testsuites><testsuite>{''.join(lines)}</testsuite></testsuites>"


def test_a_stage_that_ends_well() -> None:
    done = stage("print('all is well')")
    gpu_check.run(done, 60.0, dict(os.environ), "1/1")
    assert done.failure == ""
    assert done.said == ["all is well"]


def test_a_stage_that_fails_says_why() -> None:
    done = stage("raise SystemExit('no such kernel')")
    gpu_check.run(done, 60.0, dict(os.environ), "1/1")
    assert done.failure == "code 1: no such kernel"


def test_a_stage_that_hangs_ends_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child"
    code = f"""
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
pathlib.Path({str(child)!r}).write_text(str(other.pid))
print("started", flush=True)
time.sleep(100)
"""
    monkeypatch.setattr(gpu_check, "_INTERRUPT_S", 0.2)
    done = stage(code)
    gpu_check.run(done, 6.0, dict(os.environ), "1/1")
    assert done.failure == "ended after 6 s: its time was over (started)"
    pid = int(child.read_text())
    end_s = time.monotonic() + 10.0
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < end_s, "what a stage started lives on"
        time.sleep(0.05)


def test_tests_that_ran_are_reported_when_their_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_slow.py").write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(100)\n")
    xml = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-p", "no:cacheprovider", "--junit-xml", str(xml)]
    done = Stage("tests", 1, 60.0, command)
    monkeypatch.setattr(gpu_check, "_INTERRUPT_S", 20.0)
    # Plugins take seconds to load from a cold disk, and must not take all of the stage's time.
    gpu_check.run(done, 12.0, {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, "1/1")
    assert "time was over" in (done.failure or "")
    assert "test_a" in xml.read_text()


def test_what_is_missing_is_named_with_its_package() -> None:
    done = stage("", needs=("sys", "grpc_health_missing", "no_such_thing.at_all"))
    gpu_check.run(done, 60.0, {}, "1/1")
    assert done.failure is not None
    assert done.failure.startswith("not run: grpc_health_missing, no_such_thing.at_all missing here")


def test_no_time_left_is_a_failure() -> None:
    done = stage("")
    gpu_check.run(done, 1.0, {}, "1/1")
    assert done.failure == "not run: no time was left"


def test_limits_leave_time_to_start_within_eight_minutes() -> None:
    stages = gpu_check.stages("cuda", small=False)
    assert [one.bit for one in stages] == [1, 2, 4, 8, 16]
    assert sum(one.limit_s for one in stages) <= 470
    # Nobody waits longer than the whole, and what early stages leave, late ones may use.
    limits = [one.limit_s for one in stages]
    assert gpu_check.allowance_s(stages, 0, 470.0) == 470.0 - sum(limits[1:])
    assert gpu_check.allowance_s(stages, 4, 400.0) == 400.0


def test_device_tests_are_those_of_triton_and_of_gpu_transports() -> None:
    names = {path.name for path in gpu_check.device_tests()}
    assert "test_transport_conformance.py" in names
    assert "test_scheduler.py" not in names


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        ([("tests.kernels.test_triton_norm", "test_equal", False)], set()),
        ([("tests.kernels.test_triton_norm", "test_equal", True)], {"rms_norm"}),
        ([("tests.kernels.test_x", "test_qk_norm", True)], {"rms_norm", "qk_norm_rope_and_cache"}),
        ([("tests.kernels.test_triton_attention", "test_odd[7]", True)], {"paged_attention"}),
        ([("tests.kernels.test_launch_table", "test_x", True)], set(gpu_check.KERNEL_WORDS)),
        ([("tests.engine.test_graphs", "test_x", True)], set()),
        ([("", "tests/kernels/test_triton_norm.py", True)], {"rms_norm"}),
    ],
)
def test_failed_tests_name_kernels(tmp_path: Path, cases: list[tuple[str, str, bool]], expected: set[str]) -> None:
    path = tmp_path / "tests.xml"
    path.write_text(report(*cases))
    assert set(gpu_check.failed_kernels(path)) == expected


@pytest.mark.parametrize("text", [None, "", "<testsuites/>", "<broken"])
def test_without_a_report_no_kernel_has_passed(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "tests.xml"
    if text is not None:
        path.write_text(text)
    assert set(gpu_check.failed_kernels(path)) == set(gpu_check.KERNEL_WORDS)


def test_the_exit_status_is_the_sum_of_what_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [stage("", bit=1), stage("raise SystemExit(9)", bit=2), stage("", bit=4), stage("1 / 0", bit=8)]
    monkeypatch.setattr(gpu_check, "stages", lambda device, small: made)
    assert gpu_check.main(["--device", "cpu"]) == 10
    said = capsys.readouterr().out
    assert "stage8  " in said
    assert "ZeroDivisionError" in said


def test_kernels_hear_which_tests_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    xml = gpu_check.OUT / "tests.xml"
    text = report(("tests.kernels.test_triton_norm", "test_equal", True))
    tests = Stage(
        "tests", 1, 60.0, [sys.executable, "-c", f"open({str(xml)!r}, 'w').write({text!r}); raise SystemExit(1)"]
    )
    kernels = Stage("kernels", 8, 60.0, [sys.executable, "-c", "import sys; print(sys.argv[1:])"])
    monkeypatch.setattr(gpu_check, "stages", lambda device, small: [tests, kernels])
    assert gpu_check.main(["--device", "cpu"]) == 1
    assert kernels.said == ["['--failed', 'rms_norm']"]


def test_stages_that_can_plan_are_told_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = stage("import sys; print(sys.argv[1:])", bit=8, limit_s=40.0)
    made.budget_margin_s = 15.0
    monkeypatch.setattr(gpu_check, "stages", lambda device, small: [made])
    assert gpu_check.main(["--device", "cpu"]) == 0
    assert made.said[0].startswith("['--budget-s', '")
    assert 20 <= int(made.said[0].split("'")[3]) <= 30


def test_the_table_in_the_end_is_short() -> None:
    configs = [
        ("paged_attention", "decode batch 1 context 128", 5),
        ("paged_attention", "decode batch 32 context 4096", 90),
        ("paged_attention", "prefill 512", 30),
        ("rms_norm", "1 rows", 3),
        ("rms_norm", "8192 rows", 50),
        ("rms_norm", "64 rows", 4),
    ]
    rows = [{"op": op, "config": config, "us": str(us)} for op, config, us in configs]
    assert [(row["op"], row["config"]) for row in gpu_check.telling(rows)] == [
        ("paged_attention", "decode batch 32 context 4096"),
        ("paged_attention", "prefill 512"),
        ("rms_norm", "8192 rows"),
    ]


def test_without_a_gpu_nothing_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main([]) == gpu_check.LACKING
    assert "sees no GPU" in capsys.readouterr().err


def test_a_python_without_torch_is_told_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_packages, "missing", lambda modules: ["triton"])
    assert gpu_check.main([]) == gpu_check.LACKING
    assert "has no triton; say `make gpu-check PYTHON=...`" in capsys.readouterr().err


def test_stages_see_the_checkout_and_run_on_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    own = gpu_check.environment(tmp_path)
    assert "TRITON_INTERPRET" not in own
    assert own["PYTHONPATH"].split(os.pathsep)[:3] == [str(ROOT / "src"), str(ROOT / "bench"), str(tmp_path)]


# -------------------------------------------------------------------- packages


def wheel(folder: Path, name: str) -> None:
    """A wheel of one module that holds its own name."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", f"NAME = {name!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_carried_wheels_are_unpacked_once_without_a_network(tmp_path: Path) -> None:
    folder, target = tmp_path / "wheels", tmp_path / "site"
    folder.mkdir()
    with pytest.raises(ValueError, match="holds no wheels"):
        gpu_packages.install_wheels(folder, target)
    wheel(folder, "carried")
    site = gpu_packages.install_wheels(folder, target)
    assert (site / "carried.py").read_text() == "NAME = 'carried'\n"
    (site / "mark").touch()
    assert gpu_packages.install_wheels(folder, target) == site
    assert (site / "mark").exists()
    wheel(folder, "another")
    assert (gpu_packages.install_wheels(folder, target) / "another.py").exists()


def test_the_engine_needs_no_package_of_services() -> None:
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("uvloop", "pydantic", "ray", "fastapi"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import gpu_model, gpu_pair
from baton.engine.prefix_cache import block_hashes
print(block_hashes([1, 2, 300], 3, "salt")[0].hex())
"""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "bench")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    from baton.engine.prefix_cache import block_hashes

    assert done.stdout.strip() == block_hashes([1, 2, 300], 3, "salt")[0].hex()


def test_a_served_cluster_needs_only_what_is_listed() -> None:
    """Everything that services import is of the standard library, of torch's company, or in `SERVING`."""
    code = """
import sys
before = set(sys.modules)
import baton.prefill_worker.service, baton.decode_worker.service, baton.router.service, baton.cluster.foreground
names = {name.split(".")[0] for name in set(sys.modules) - before if not name.startswith("_")}
print(" ".join(sorted(names - set(sys.stdlib_module_names) - {"baton"})))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    needed = set(done.stdout.split())
    listed = {name.split(".")[0] for name in gpu_packages.SERVING}
    assert not [name for name in ("ray", "redis", "httpx") if name in needed]
    carried = ("uvloop", "httptools", "fastapi", "orjson", "pydantic", "pydantic_core", "starlette", "uvicorn")
    assert {"grpc_health", "grpc_reflection"} <= needed & listed
    assert {name for name in carried if name in needed} <= listed
