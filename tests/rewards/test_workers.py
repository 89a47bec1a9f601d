import contextlib
import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from rewards import Reward, Sample, Score, ungraded
from rewards.background import submit
from rewards.workers import Failure, Workers

HERE = "tests.rewards.test_workers"


def double(item):
    return 2 * item


def pid(item):
    return os.getpid()


def act(item):
    """What a bad item may do to its process."""
    if item == "raise":
        raise ValueError("no such item")
    if item == "hang":
        while True:
            pass
    if item == "hang in C":
        return 10 ** (10**9) % 7
    if item == "exit":
        os._exit(3)
    if item == "memory":
        return len(bytearray(2**40))
    if item == "print":
        print("[1, null]", flush=True)
        os.write(1, b"[1, null]\n")
    if item == "set":
        return {1}
    if item == "forge":
        for fd in range(3, 10):
            with contextlib.suppress(OSError):
                os.write(fd, b"no JSON\n")
    if item == "pid":
        return os.getpid()
    if item == "stdin":
        return sys.stdin.read()
    if isinstance(item, list):  # say whose process it is that waits from now on
        Path(item[0]).write_text(str(os.getpid()))
        time.sleep(60)
    return item


def test_results_come_in_order():
    items = list(range(300))
    assert Workers(f"{HERE}:double", seconds=10).map(items) == [2 * item for item in items]


def test_nothing_starts_and_nothing_comes_of_no_items():
    assert Workers("no.such:function", seconds=1).map([]) == []


@pytest.mark.parametrize("bad", ["raise", "hang", "hang in C", "exit", "memory"])
def test_a_bad_item_costs_itself_and_nothing_else(bad):
    results = Workers(f"{HERE}:act", seconds=0.5, workers=2).map(["a", bad, "b", bad, "c"])
    assert results[0::2] == ["a", "b", "c"]
    assert all(isinstance(result, Failure) for result in results[1::2])
    assert results[1].timed_out == bad.startswith("hang")


@pytest.mark.parametrize("bad", [{1}, 10**5000, object()], ids=["set", "long", "object"])
def test_an_item_that_cannot_be_sent_costs_itself_and_nothing_else(bad):
    before, failed, after = Workers(f"{HERE}:act", seconds=5, workers=1).map(["a", bad, "b"])
    assert (before, after) == ("a", "b")
    assert "cannot be written as JSON" in failed.why


def test_a_result_that_cannot_be_sent_costs_itself_and_nothing_else():
    before, failed, after = Workers(f"{HERE}:act", seconds=5, workers=1).map(["a", "set", "b"])
    assert (before, after) == ("a", "b")
    assert "set is not JSON serializable" in failed.why


def test_what_a_function_writes_in_place_of_an_answer_is_a_failure():
    before, failed, after = Workers(f"{HERE}:act", seconds=5, workers=1).map(["a", "forge", "b"])
    assert (before, after) == ("a", "b")
    assert "answered with something else" in failed.why


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"seconds": 1, "workers": 0}])
def test_workers_without_time_or_number_are_refused(limits):
    with pytest.raises(ValueError, match="workers need time and at least one of them"):
        Workers("operator:neg", **limits)


ENDINGS = {"at its end": "raise SystemExit(3)", "by Ctrl-C": "signal.raise_signal(signal.SIGINT)"}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_a_process_ends_at_once_whatever_its_workers_still_do(ending):
    program = textwrap.dedent(f"""
        import signal, threading, time
        from rewards.workers import Workers
        ask = Workers("time:sleep", seconds=30, workers=1).map
        threading.Thread(target=ask, args=([20] * 50,), daemon=True).start()
        time.sleep(0.5)
        {ending}
    """)
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, timeout=15)
    assert time.monotonic() - started < 15


def kill_whoever_writes(path):
    """End a worker as the kernel ends one that took too much memory, in the middle of an item; gives its process's id."""
    while not (path.exists() and path.read_text()):
        time.sleep(0.01)
    os.kill(int(path.read_text()), signal.SIGKILL)
    return int(path.read_text())


def test_a_worker_killed_in_mid_batch_costs_its_item_and_is_replaced(tmp_path):
    workers = Workers(f"{HERE}:act", seconds=30, workers=1)
    killing = submit(kill_whoever_writes, tmp_path / "pid")
    before, failed, after, replaced = workers.map(["a", [str(tmp_path / "pid")], "b", "pid"])
    assert (before, after) == ("a", "b")
    assert failed == Failure(f"the worker of {HERE}:act ended (exit status -9)")
    assert replaced != killing.result()


def test_a_worker_killed_between_batches_costs_nothing():
    workers = Workers(f"{HERE}:act", seconds=30, workers=1)
    (killed,) = workers.map(["pid"])
    os.kill(killed, signal.SIGKILL)
    while _alive(killed):
        time.sleep(0.01)
    first, second, replaced = workers.map(["a", "b", "pid"])
    assert (first, second) == ("a", "b")
    assert replaced != killed


class Fragile(Reward):
    """Scores in two processes that samples may hang or get killed: 1 for each character."""

    waits = True

    def __init__(self, seconds=30.0):
        self.workers = Workers(f"{HERE}:act", seconds=seconds, workers=2)

    def __call__(self, samples):
        results = self.workers.map([json.loads(sample.completion) for sample in samples])
        return [ungraded(r.why) if isinstance(r, Failure) else Score(len(str(r))) for r in results]


def samples(*items):
    return [Sample(prompt="", completion=json.dumps(item)) for item in items]


def test_of_a_killed_worker_one_sample_is_ungraded_and_the_others_are_scored_in_order(tmp_path):
    submit(kill_whoever_writes, tmp_path / "pid")
    futures = [Fragile().score_async([sample]) for sample in samples("a", [str(tmp_path / "pid")], "bb", "ccc", "dddd")]
    scores = [future.result()[0] for future in futures]
    assert [score.value for score in scores] == [1, None, 2, 3, 4]
    assert "exit status -9" in scores[1].error


def test_a_reward_that_hangs_ends_at_its_time_while_others_go_on():
    fragile = Fragile(seconds=1.5)
    while len(set(fragile.workers.map(["pid"] * 8))) < 2:  # both processes are up: only then is it a matter of the item
        pass
    hanging, *others = [fragile.score_async([sample]) for sample in samples("hang", *"abcdefgh")]
    assert [future.result()[0].value for future in others] == [1] * 8
    assert not hanging.done()
    assert hanging.result()[0].error == "took longer than 1.5 s"


def test_ctrl_c_ends_the_waiting():
    workers = Workers("time:sleep", seconds=30, workers=1)
    interrupt = threading.Timer(0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        workers.map([2] * 50)
    assert workers.map([0]) == [None]  # waits for the item that had begun, not for those behind it


def test_a_failure_says_why():
    workers = Workers(f"{HERE}:act", seconds=0.5, workers=1)
    raised, hung, ended = workers.map(["raise", "hang", "exit"])
    assert "ValueError: no such item" in raised.why
    assert hung.why == "took longer than 0.5 s"
    assert "exit status 3" in ended.why


def test_what_the_function_prints_is_not_taken_for_an_answer():
    assert Workers(f"{HERE}:act", seconds=5, workers=1).map(["print", "a", "stdin"]) == ["print", "a", ""]


@pytest.mark.parametrize("text", ["\ud800", "\x00", "a\nb\r\n\u2028", "x" * 3_000_000])
def test_any_text_crosses(text):
    assert Workers(f"{HERE}:act", seconds=10, workers=1).map([text]) == [text]


def test_processes_stay_warm_and_are_shared():
    first = Workers(f"{HERE}:pid", seconds=10, workers=1).map([0, 0])
    again = Workers(f"{HERE}:pid", seconds=20, workers=1).map([0])
    assert set(first) == set(again)


def test_the_deadline_holds_on_any_thread():
    results = []
    threads = [
        threading.Thread(target=lambda: results.extend(Workers(f"{HERE}:act", seconds=0.3).map(["hang", "a"])))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(str(result) for result in results if result != "a") == 3 * [
        str(Failure("took longer than 0.3 s", True))
    ]
    assert results.count("a") == 3


def test_workers_can_be_copied_and_pickled():
    workers = Workers(f"{HERE}:double", seconds=10)
    assert pickle.loads(pickle.dumps(workers)) == copy.deepcopy(workers) == workers  # noqa: S301 - our own bytes


def test_a_forked_process_has_workers_of_its_own():
    workers = Workers(f"{HERE}:pid", seconds=10, workers=1)
    (ours,) = workers.map([0])
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, str(workers.map([0])[0]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(reading, 20)) != ours
    assert workers.map([0]) == [ours]


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("busy", [False, True])
def test_workers_end_with_us_even_when_we_are_killed(busy):
    ask = f'threading.Thread(target=Workers("{HERE}:act", seconds=1, workers=1).map, args=(["hang"],)).start()'
    program = textwrap.dedent(f"""
        import threading, time
        from rewards.workers import Workers
        print(*Workers("{HERE}:act", seconds=1, workers=1).map(["pid"]), flush=True)
        {ask if busy else ""}
        time.sleep(60)
    """)
    ours = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=os.getcwd())
    worker = int(ours.stdout.readline())
    if busy:
        time.sleep(0.3)
    os.kill(ours.pid, signal.SIGKILL)
    ours.wait()
    ours.stdout.close()
    for _ in range(100):
        if not _alive(worker):
            return
        time.sleep(0.1)
    raise AssertionError(f"worker {worker} lives on")
