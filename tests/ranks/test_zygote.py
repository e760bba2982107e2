import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megalite.train.ranks import PACKAGE_FOLDER
from tests.ranks.client import Ranks

JOBS = "tests.ranks.zygote_jobs"


def is_held(lock: Path) -> bool:
    """Whether a process that locked this file still lives."""
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether `condition` holds before `seconds` have passed."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_results_come_in_rank_order_from_single_threaded_warm_children(run_ranks, ranks, capsys):
    results = run_ranks(f"{JOBS}:report", 3, scale=10)
    assert [r["rank"] for r in results] == [0, 1, 2]
    assert [r["scaled"] for r in results] == [0, 10, 20]
    for r in results:
        assert r["world"] == 3 and r["threads"] == 1 and r["grouped"] and r["warm"] and r["session"]
        assert r["parent"] == ranks.process.pid != os.getpid()
    assert "[rank 2] hello from 2" in capsys.readouterr().out


def test_one_rank_has_no_process_group(run_ranks):
    (result,) = run_ranks(f"{JOBS}:report", 1, scale=1)
    assert not result["grouped"]


def test_all_reduce_over_four_ranks_is_right(run_ranks):
    assert run_ranks(f"{JOBS}:sum_of_ranks", 4) == [[10.0, 30.0]] * 4


def test_children_compute_forward_and_backward_job_after_job(run_ranks):
    for _ in range(3):
        assert run_ranks(f"{JOBS}:train_a_little", 2, timeout=20) == pytest.approx([2.0, 2.0])


def test_an_exception_is_reported_with_its_rank_and_the_others_are_killed(ranks, tmp_path):
    start = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        kwargs = {"who": 1, "lock_folder": str(tmp_path)}
        ranks.results(f"{JOBS}:one_raises", 3, kwargs=kwargs, timeout=60, grace=0.5)
    text = str(caught.value)
    assert "killed 0.5 s after rank 1 had failed" in text
    assert text.index("rank 1 raised") < text.index("rank 0 ended by SIGKILL")
    assert "KeyError: 'the number 17 is missing'" in text
    assert "zygote_jobs.py" in text and "in one_raises" in text
    assert time.monotonic() - start < 30
    assert not is_held(tmp_path / "0") and not is_held(tmp_path / "2")


def test_the_first_failure_stands_before_its_echo_on_other_ranks(run_ranks):
    with pytest.raises(AssertionError) as caught:
        run_ranks(f"{JOBS}:one_raises_others_reduce", 3, who=2)
    text = str(caught.value)
    assert "3 of 3 ranks failed" in text
    assert text.index("rank 2 raised") < min(text.index(f"rank {r} raised") for r in (0, 1))


def test_a_hang_is_killed_by_the_timeout_and_shows_where(run_ranks):
    start = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        run_ranks(f"{JOBS}:one_hangs", 2, timeout=2, who=1)
    assert time.monotonic() - start < 30
    text = str(caught.value)
    assert "rank 1 ended by SIGKILL" in text
    assert "in sleep_on_purpose" in text


def test_a_crash_is_reported_by_its_signal_and_stack(ranks):
    with pytest.raises(AssertionError) as caught:
        ranks.results(f"{JOBS}:one_crashes", 2, kwargs={"who": 0}, timeout=20, grace=0.5)
    text = str(caught.value)
    assert text.index("rank 0 ended by SIGSEGV") < text.index("rank 1 ")
    assert "in one_crashes" in text


def test_a_rank_that_exits_has_failed(run_ranks):
    with pytest.raises(AssertionError, match="SystemExit: 0"):
        run_ranks(f"{JOBS}:leaves_early", 1)


def test_a_result_that_json_does_not_hold_is_an_error(run_ranks):
    with pytest.raises(AssertionError, match="set is not JSON serializable"):
        run_ranks(f"{JOBS}:returns_a_set", 1)


def test_an_unknown_job_is_an_error(run_ranks):
    with pytest.raises(AssertionError, match="no_such_job"):
        run_ranks(f"{JOBS}:no_such_job", 1)


@pytest.mark.parametrize("how", ["zygote killed", "client gone"])
def test_ranks_and_what_they_started_die_with_the_zygote(tmp_path, how):
    own, lock, errors = Ranks(), tmp_path / "lock", []
    kwargs = {"lock": str(lock), "hang": True}

    def job() -> None:
        try:
            own.results(f"{JOBS}:starts_a_process", 1, kwargs=kwargs, timeout=100)
        except AssertionError as error:
            errors.append(str(error))

    thread = threading.Thread(target=job)
    thread.start()
    assert wait_for((tmp_path / "lock.started").exists, seconds=60)
    assert is_held(lock)
    assert own.process is not None and own.process.stdin is not None
    if how == "zygote killed":
        os.kill(own.process.pid, signal.SIGKILL)
    else:
        own.process.stdin.close()
    thread.join(30)
    assert errors == ["the process that ranks are forked from has ended"]
    assert wait_for(lambda: not is_held(lock))


def test_what_a_rank_leaves_running_ends_with_it(run_ranks, tmp_path):
    lock = tmp_path / "lock"
    assert run_ranks(f"{JOBS}:starts_a_process", 1, lock=str(lock), hang=False) == [None]
    assert wait_for(lambda: not is_held(lock))


def test_a_killed_rank_is_noticed_though_its_fork_lives_on(run_ranks, tmp_path):
    lock = tmp_path / "lock"
    start = time.monotonic()
    with pytest.raises(AssertionError, match="rank 0 ended by SIGKILL"):
        run_ranks(f"{JOBS}:dies_while_its_fork_lives", 1, timeout=60, lock=str(lock))
    assert time.monotonic() - start < 30
    assert wait_for(lambda: not is_held(lock))


# -- ranks that are kept -----------------------------------------------------------------------


@pytest.fixture
def kept(ranks, monkeypatch):
    """The warm process, whose ranks live on from job to job."""
    monkeypatch.setattr(ranks, "keep", True)
    return ranks


def pids(ranks: Ranks, world: int) -> list[int]:
    reports = ranks.results(f"{JOBS}:report", world, kwargs={"scale": 1}, timeout=20)
    return [report["pid"] for report in reports]


def test_kept_ranks_take_job_after_job_in_worlds_of_any_size(kept, monkeypatch):
    monkeypatch.setattr(kept, "keep", False)
    before = pids(kept, 2)
    monkeypatch.setattr(kept, "keep", True)
    first = pids(kept, 2)
    assert not set(first) & set(before)
    assert kept.results(f"{JOBS}:sum_of_ranks", 4, kwargs={}, timeout=20) == [[10.0, 30.0]] * 4
    assert kept.results(f"{JOBS}:sum_of_ranks", 3, kwargs={}, timeout=20) == [[6.0, 14.0]] * 3
    (alone,) = kept.results(f"{JOBS}:report", 1, kwargs={"scale": 1}, timeout=20)
    assert alone["pid"] == first[0] and not alone["grouped"]
    assert pids(kept, 4)[:2] == first
    monkeypatch.setattr(kept, "keep", False)
    assert not set(pids(kept, 2)) & set(first)


@pytest.mark.parametrize(
    ("job", "kwargs", "text"),
    [
        ("one_raises_others_reduce", {"who": 1}, "KeyError: 'the number 17 is missing'"),
        ("one_crashes", {"who": 0}, "rank 0 ended by SIGSEGV"),
        ("one_hangs", {"who": 1}, "in sleep_on_purpose"),
    ],
)
def test_after_a_job_that_failed_kept_ranks_are_new(kept, job, kwargs, text):
    before = pids(kept, 3)
    with pytest.raises(AssertionError, match=text):
        kept.results(f"{JOBS}:{job}", 2, kwargs=kwargs, timeout=2, grace=0.2)
    after = pids(kept, 3)
    assert not set(after) & set(before)
    assert not any(is_there(pid) for pid in before)
    assert pids(kept, 3) == after


def is_there(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_kept_rank_that_dies_between_jobs_costs_no_job(kept):
    before = pids(kept, 2)
    os.kill(before[1], signal.SIGKILL)
    # The warm process reaps it at the next job; this one is of ranks that live.
    assert wait_for(lambda: not set(pids(kept, 1)) & set(before))
    assert not set(pids(kept, 2)) & set(before)


def test_kept_ranks_say_and_print_of_each_job_what_is_its_own(kept, capsys):
    pids(kept, 2)
    capsys.readouterr()
    assert kept.results(f"{JOBS}:sum_of_ranks", 2, kwargs={}, timeout=20) == [[3.0, 5.0]] * 2
    assert capsys.readouterr().out == ""
    pids(kept, 2)
    assert capsys.readouterr().out == "[rank 0] hello from 0\n[rank 1] hello from 1\n"


def test_kept_ranks_hold_nothing_of_a_job_that_is_done(kept):
    rows = [kept.results(f"{JOBS}:leaves_a_circle", 2, kwargs={}, timeout=20)[1] for _ in range(4)]
    assert [row["jobs"] for row in rows] == [1, 2, 3, 4]
    assert [row["here"] for row in rows] == [0, 0, 0, 0]
    for what in ("files", "threads"):
        assert rows[3][what] == rows[1][what], what


def test_job_on_the_cpu_asks_ranks_of_gpus_for_none(ranks, monkeypatch):
    monkeypatch.setattr(ranks, "device", "cuda")  # of which there need not be any
    answer = ranks.run(f"{JOBS}:has_cuda", 1, kwargs={}, timeout=20, device="cpu")
    assert answer.results == [False]


def test_kept_ranks_and_what_they_started_end_with_their_command(tmp_path):
    own, lock = Ranks(keep=True), tmp_path / "lock"
    kwargs = {"lock": str(lock), "hang": False}
    own.results(f"{JOBS}:starts_a_process", 1, kwargs=kwargs, timeout=60)
    assert is_held(lock)
    own.close()
    assert wait_for(lambda: not is_held(lock))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("import stand_in.no_such_module", "No module named 'stand_in.no_such_module'"),
        ("import torch\nX = torch.zeros(3)", "ran in the process that ranks are forked from"),
    ],
)
def test_a_module_that_cannot_be_imported_or_computes_is_a_loud_failure(tmp_path, body, text):
    assert text in said_on_import(tmp_path, body)


def test_packages_that_are_not_installed_are_missed_by_those_who_need_them(tmp_path):
    """A machine that only trains may lack what serves pages."""
    assert said_on_import(tmp_path, "import no_such_package.part") == ""


def said_on_import(folder: Path, body: str) -> str:
    """What the warm process answers, before any job, when a module of its package is this."""
    package = folder / "stand_in"
    (package / "room").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "room" / "__init__.py").write_text("")
    (package / "room" / "bad.py").write_text(body + "\n")
    paths = [str(folder), str(PACKAGE_FOLDER)]
    code = (
        f"import sys; sys.path[:0] = {paths}\n"
        "from megalite.train.zygote import main; main('stand_in')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
    )
    return json.loads(result.stdout.splitlines()[0]).get("error", "")
