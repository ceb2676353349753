"""What is expected of replicas, and when a reply is late."""

import pytest

from router.reply_times import LatePoint, ServiceTimes, get_size_class


def test_the_first_frames_of_a_replica_tell_nothing() -> None:
    times = ServiceTimes()
    assert times.expect_s(4) is None
    for service_s in (5.0, 3.0, 0.001):
        times.record(4, service_s)
    assert times.expect_s(4) == 0.001


def test_the_mean_follows_a_replica_that_becomes_slow_within_ten_frames() -> None:
    times = ServiceTimes()
    for service_s in [0.001] * 10 + [0.01] * 10:
        times.record(4, service_s)
    assert times.expect_s(4) == pytest.approx(0.01, rel=0.15)


def test_an_unknown_size_is_judged_in_proportion_to_the_nearest() -> None:
    times = ServiceTimes()
    for size_class, service_s in [(2, 0.001)] * 3 + [(10, 0.1)] * 3:
        times.record(size_class, service_s)
    assert times.expect_s(4) == pytest.approx(0.004)
    assert times.expect_s(9) == pytest.approx(0.05)


def test_sizes_of_a_class_differ_by_two_at_most() -> None:
    assert [get_size_class(n) for n in (1, 2, 3, 4, 7, 8)] == [1, 2, 2, 3, 3, 4]


def test_late_is_what_one_reply_in_a_hundred_exceeds() -> None:
    point = LatePoint()
    for _ in range(63):
        point.record(0.001)
    assert point.late_s is None  # too few
    for index in range(1000):
        point.record(0.02 if index % 200 == 0 else 0.001)
    assert point.late_s is not None and 0.001 <= point.late_s < 0.0013
    for index in range(1000):
        point.record(0.02 if index % 20 == 0 else 0.001)
    assert 0.02 <= point.late_s < 0.025


def test_what_was_long_ago_is_forgotten() -> None:
    point = LatePoint()
    for reply_s in [1.0] * 500 + [0.001] * 8000:
        point.record(reply_s)
    assert point.late_s is not None and point.late_s < 0.0013


@pytest.mark.parametrize("reply_s", [0.0, 1e-9, 1e9])
def test_any_time_is_taken(reply_s: float) -> None:
    point = LatePoint()
    for _ in range(200):
        point.record(reply_s)
    assert point.late_s is not None
