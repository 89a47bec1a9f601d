import io
import json
import threading

import pytest
from rich.console import Console

from agents.core.run import LOCK_FILE, lock
from benchmarks.report import live, runs
from benchmarks.report.live import braille, picture, seconds_left, watch_run
from tests.benchmarks.report import made_up


def printed(folder, **options):
    file = io.StringIO()
    Console(file=file, width=100, **options).print(picture(folder))
    return file.getvalue()


def test_a_curve_rises_from_the_lowest_dot_to_the_highest():
    assert braille([0.0, 3.0], width=1, height=1) == ["⡸"]
    assert braille([3.0, 0.0], width=1, height=1) == ["⢱"]
    assert braille([0, 7], width=1, height=2) == ["⢸", "⡸"]


def test_a_flat_curve_stays_at_the_bottom_and_a_long_one_within_its_width():
    assert braille([5.0, 5.0], width=1, height=1) == ["⣀"]
    assert [len(line) for line in braille(list(range(1000)), width=30)] == [30, 30]


def test_the_time_left_goes_by_the_last_steps():
    steps = [{"step": i, "episodes": 10 * i, "seconds": 100.0 if i < 5 else 2.0} for i in range(1, 40)]
    assert seconds_left(steps, 490) == pytest.approx(20.0)
    assert seconds_left(steps[:1], 490) is None
    assert seconds_left([{"step": 1}, {"step": 2}], 490) is None


def test_the_picture_has_step_curves_and_two_different_completions(tmp_path):
    text = printed(made_up.run(tmp_path))
    for part in ("step 4", "64 of 64 episodes", "reward", "entropy", "length", "KL", "reward 1, eos", "reward 0, eos"):
        assert part in text


def test_the_time_left_is_told_while_a_process_trains(tmp_path):
    made_up.run(tmp_path)
    assert "stopped" in printed(tmp_path)
    with lock(tmp_path):
        assert "0:00 left" in printed(tmp_path)
    assert "stopped" in printed(tmp_path)


def test_an_alarm_is_shown_while_it_is_on(tmp_path):
    made_up.run(tmp_path)
    made_up.alarm(tmp_path, step=3)
    assert "ALARM since step 3: entropy collapsed" in printed(tmp_path)
    made_up.alarm(tmp_path, step=4, over=True)
    assert "ALARM" not in printed(tmp_path)


def test_a_run_without_a_step_or_without_rollouts_has_a_picture(tmp_path):
    made_up.run(tmp_path)
    for path in tmp_path.glob("rollouts/*"):
        path.unlink()
    assert "step 4" in printed(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    assert "no step yet" in printed(tmp_path)


def test_a_broken_rollout_is_named(tmp_path):
    made_up.run(tmp_path)
    (tmp_path / "rollouts" / "000004.jsonl.gz").write_bytes(b"\x1f\x8b broken")
    assert "000004.jsonl.gz cannot be read" in printed(tmp_path)


@pytest.mark.parametrize("terminal", [False, True])
def test_hostile_texts_reach_no_terminal(tmp_path, terminal):
    made_up.hostile_run(tmp_path)
    text = printed(tmp_path, force_terminal=terminal, color_system=None)
    assert not [character for character in text if character < " " and character != "\n"]
    assert not set(text) & set("\x7f\x9b\u2028\u202e\ud800")
    assert "[red]markup[/red]" in text.replace("\n", "")
    assert "␛]0;owned␇" in text


def test_without_a_terminal_there_is_one_picture(tmp_path, capsys):
    watch_run(made_up.run(tmp_path))
    assert capsys.readouterr().out.count("step 4") == 1


def test_watching_ends_with_the_training(tmp_path, monkeypatch):
    made_up.run(tmp_path)
    file = io.StringIO()
    monkeypatch.setattr(live, "Console", lambda: Console(file=file, force_terminal=True, width=100))
    watching = threading.Thread(target=watch_run, args=(tmp_path, 0.01))
    watching.start()
    with open(tmp_path / "metrics.jsonl", "a") as metrics:
        metrics.write(json.dumps({"step": 5, "reward": 0.5, "episodes": 80}) + "\n")
    (tmp_path / "evaluation_after.json").write_text("{}")
    watching.join(timeout=20)
    assert not watching.is_alive()
    assert "step 5" in file.getvalue()
    assert "done" in file.getvalue()


def test_an_interruption_ends_watching_quietly(tmp_path, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "Console", lambda: Console(file=io.StringIO(), force_terminal=True))
    monkeypatch.setattr(live.time, "sleep", interrupt)
    watch_run(made_up.run(tmp_path))


def test_a_folder_without_a_run_and_a_pause_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no run in"):
        watch_run(tmp_path)
    with pytest.raises(ValueError, match="seconds above 0"):
        watch_run(tmp_path, 0.0)


def test_the_lock_is_that_of_a_run():
    assert runs.LOCK_FILE == LOCK_FILE
