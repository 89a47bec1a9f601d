import math

import numpy as np
import pytest

from benchmarks.report.curves import BINS, numbers, run_line, seeds_line


def steps(number, value):
    return np.array([[i, value(i)] for i in range(1, number + 1)], dtype=float)


def test_only_steps_that_have_both_numbers_are_drawn():
    logged = [
        {"step": 1, "a": 0.5},
        {"step": 2},
        {"step": 3, "a": None},
        {"step": 4, "a": math.nan},
        {"step": 5, "a": 1},
    ]
    assert numbers(logged, "step", "a").tolist() == [[1, 0.5], [5, 1]]
    assert numbers([], "step", "a").shape == (0, 2)


def test_few_steps_are_drawn_one_by_one_and_have_no_band():
    line = run_line("a", 0, steps(BINS, lambda i: i))
    assert list(line.y_N) == list(range(1, BINS + 1))
    assert len(line.low_N) == 0


def test_many_steps_are_drawn_as_means_with_a_band_that_holds_80_of_100():
    line = run_line("a", 0, steps(11 * BINS, lambda i: (i - 1) % 11))
    assert len(line.y_N) == BINS
    assert line.x_N[0] == 6
    assert (line.low_N[0], line.y_N[0], line.high_N[0]) == (1, 5, 9)


def test_seeds_are_averaged_stretch_by_stretch_with_their_interval():
    line = seeds_line("a", 0, [steps(4 * BINS, lambda i: 1.0), steps(4 * BINS, lambda i: 3.0)], 4 * BINS)
    assert len(line.x_N) == BINS
    assert line.x_N[0] == pytest.approx(2.5)
    assert (line.low_N[0], line.y_N[0], line.high_N[0]) == (1.0, 2.0, 3.0)


def test_where_one_run_alone_has_come_there_is_no_band():
    line = seeds_line("a", 0, [steps(BINS, lambda i: 1.0), steps(2 * BINS, lambda i: 3.0)], 2 * BINS)
    half = BINS // 2
    assert line.y_N == [2.0] * half + [3.0] * half
    assert line.low_N == [1.0] * half + [None] * half


def test_stretches_that_no_run_has_a_step_in_are_left_out():
    line = seeds_line("a", 0, [np.array([[10.0, 1.0], [1000.0, 2.0]])] * 2, 1000.0)
    assert line.x_N == [10.0, 1000.0]
