import re
from xml.etree import ElementTree

import pytest

from benchmarks.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Line, short, ticks


def _polyline(chart):
    (line,) = [element for element in ElementTree.fromstring(chart.svg()).iter() if element.tag == "polyline"]
    return [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]


def test_the_lowest_and_highest_points_lie_within_the_axes():
    points = _polyline(Chart("y", "x", [Line("a", 0, [0, 1, 2], [0.0, 10.0, 5.0])]))
    assert points[0][0] == LEFT
    assert points[2][0] == WIDTH - RIGHT
    assert TOP < points[1][1] < points[2][1] < points[0][1] <= HEIGHT - BOTTOM
    assert points[2][1] == pytest.approx((points[0][1] + points[1][1]) / 2, abs=0.06)


def test_doublings_are_evenly_spaced_on_a_logarithmic_axis():
    xs = [x for x, _ in _polyline(Chart("pass@k", "k", [Line("a", 0, [1, 2, 4], [0, 1, 2])], x_scale="log2"))]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)


def test_a_square_root_axis_spaces_squares_evenly_and_takes_a_kl_a_little_below_zero():
    xs = [x for x, _ in _polyline(Chart("r", "kl", [Line("a", 0, [-0.01, 1, 4], [0, 1, 2])], x_scale="sqrt"))]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)


@pytest.mark.parametrize("y", [[0.5, 0.5], [0.0, 0.0], [1e9, 1e9 + 1e-3], [-3.0, -3.0]])
def test_a_flat_curve_is_drawn(y):
    assert all(TOP <= at <= HEIGHT - BOTTOM for _, at in _polyline(Chart("y", "x", [Line("a", 0, [0, 1], y)])))


def test_a_lone_point_and_gaps_are_drawn():
    svg = Chart("y", "x", [Line("a", 0, [1], [2.0], [1.0], [3.0]), Line("b", 1, [0, 1], [None, None])]).svg()
    assert 'class="bar"' in svg
    assert "polyline" not in svg


def test_a_band_goes_along_its_upper_side_and_back_along_the_lower():
    svg = Chart("y", "x", [Line("a", 0, [0, 1], [1.0, 2.0], [0.0, 1.0], [2.0, 3.0])]).svg()
    corners = re.search(r'polygon class="band" points="([^"]+)"', svg)[1].split()
    xs = [float(corner.split(",")[0]) for corner in corners]
    assert xs == [LEFT, WIDTH - RIGHT, WIDTH - RIGHT, LEFT]


def test_a_point_tells_its_interval_and_nothing_of_one_without():
    line = Line("a", 0, [0, 1], [1.0, 2.0], [0.5, None], [1.5, None], ["start", "end"])
    tips = re.findall(r'data-tip="([^"]+)"', Chart("y", "x", [line]).svg())
    assert tips == ["a: 1 [0.5, 1.5] at 0 · start", "a at 1 · end"]


def test_texts_in_a_chart_are_escaped():
    svg = Chart("<y>", "<x>", [Line("<a>\x00\x1b", 0, [0, 1], [0, 1])]).svg()
    ElementTree.fromstring(svg)
    assert "<a>" not in svg


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0, 100, [0, 25, 50, 75, 100]), (-1, 1, [-1, -0.5, 0, 0.5, 1])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == expected


def test_numbers_are_short():
    assert [short(x) for x in (0, 1234, 2e6, -0.5, 1e-4)] == ["0", "1.23k", "2M", "−0.5", "0.0001"]


def test_an_axis_goes_below_zero_only_where_values_do():
    for y, below in (([0.0, 0.0], False), ([0.0, 9.0], False), ([-5.0, 5.0], True)):
        labels = re.findall(r'text-anchor="end">([^<]+)<', Chart("y", "x", [Line("a", 0, [0, 1], y)]).svg())
        assert any(label.startswith("−") for label in labels) is below
