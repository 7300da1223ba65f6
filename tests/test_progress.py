"""Progress in a log: few lines, and a time left that was measured."""

import re

import pytest

from kvq_calib import progress
from kvq_calib.progress import ProgressReporter


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test turns; returns how to turn it."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def turn(seconds):
        now[0] += seconds

    return turn


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def steps(reporter, clock, what, numbers, total, seconds):
    for number in numbers:
        clock(seconds)
        reporter(what, number, total)


def test_the_time_left_is_that_of_the_steps_so_far(clock, capsys):
    with ProgressReporter() as reporter:
        steps(reporter, clock, "thresholds", range(1, 5), 10, seconds=20)
        assert lines(capsys)[-1] == "thresholds: 4 of 10, about 2:00 left of this part"
        # Another part has another speed: nothing is claimed before it is measured.
        steps(reporter, clock, "codebooks", [1], 100, seconds=400)
        assert not lines(capsys)
        steps(reporter, clock, "codebooks", [2], 100, seconds=400)
        assert lines(capsys) == ["codebooks: 2 of 100, about 10:53:20 left of this part"]


def test_steps_of_an_earlier_run_do_not_count(clock, capsys):
    with ProgressReporter() as reporter:
        steps(reporter, clock, "codebooks", [91, 92], 100, seconds=30)
        assert lines(capsys) == ["codebooks: 92 of 100, about 4:00 left of this part"]


def test_a_log_gets_a_line_now_and_then_and_the_last_step(clock, capsys):
    with ProgressReporter() as reporter:
        steps(reporter, clock, "codebooks", range(1, 101), 100, seconds=1)
    found = lines(capsys)
    assert len(found) == 7
    assert found[-1] == "codebooks: 100 of 100"
    left = [re.search(r"about (.*) left", line).group(1) for line in found[:-1]]
    assert left == ["1:24", "1:09", "0:54", "0:39", "0:24", "0:09"]


def test_quiet_ranks_say_nothing(clock, capsys):
    with ProgressReporter(quiet=True) as reporter:
        steps(reporter, clock, "codebooks", range(1, 4), 3, seconds=100)
        reporter.say("a word")
    assert not lines(capsys)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7325, "2:02:05")]
)
def test_clock(seconds, text):
    assert progress._clock(seconds) == text
