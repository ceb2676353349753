"""When steps are split: by measured times alone, here made up."""

from collections.abc import Callable

import pytest

from router.overlap_policy import OverlapPolicy, StepSize, StepTimes, parse_micro_batches

DECODE = StepSize(32, 32)
MANY = 400


class Machine:
    """Step times of a router that computes compute_s, overlaps as it can, and pays overhead_s for each more part."""

    def __init__(self, compute_s: float, wait_s: float, overhead_s: float) -> None:
        self.compute_s = compute_s
        self.wait_s = wait_s
        self.overhead_s = overhead_s

    def step(self, count: int) -> StepTimes:
        wait_s = max(0.0, self.wait_s - self.compute_s * (count - 1) / count)
        step_s = self.compute_s + wait_s + self.overhead_s * (count - 1)
        return StepTimes(step_s, wait_s)


def drive(
    policy: OverlapPolicy, step: Callable[[int], StepTimes], num_steps: int = MANY, size: StepSize = DECODE
) -> list[int]:
    """The counts that were chosen."""
    chosen: list[int] = []
    for _ in range(num_steps):
        chosen.append(policy.choose(size))
        policy.record(size, chosen[-1], step(chosen[-1]))
    return chosen


def test_it_switches_on_when_waiting_can_be_covered() -> None:
    network = Machine(compute_s=0.010, wait_s=0.005, overhead_s=0.001)
    chosen = drive(OverlapPolicy("auto"), network.step)
    assert chosen[0] == 1
    assert chosen[-100:].count(2) > 90


def test_it_takes_more_parts_when_two_do_not_cover_the_waiting() -> None:
    far = Machine(compute_s=0.010, wait_s=0.008, overhead_s=0.0005)
    assert drive(OverlapPolicy("auto"), far.step)[-100:].count(4) > 90


def test_where_experts_share_the_cores_it_stays_off_and_hardly_tries() -> None:
    """Waiting is the experts' own computing there: nothing is hidden, the parts cost."""

    def step(count: int) -> StepTimes:
        return StepTimes(0.010 + 0.003 * (count - 1), 0.006)

    chosen = drive(OverlapPolicy("auto"), step, 5000)
    assert chosen.count(1) > 0.99 * len(chosen)
    assert any(count != 1 for count in chosen)


def test_one_lucky_comparison_decides_nothing() -> None:
    """The first five split steps were short ones of their class."""
    num_split = 0

    def step(count: int) -> StepTimes:
        nonlocal num_split
        num_split += count > 1
        is_lucky = count > 1 and num_split <= 5
        return StepTimes(0.007 if is_lucky else 0.010 + 0.003 * (count - 1), 0.006)

    chosen = drive(OverlapPolicy("auto"), step)
    assert 5 < chosen.count(2) <= 10
    assert chosen[-1] == 1


def test_what_is_clearly_slower_is_given_up_after_few_steps() -> None:
    chosen = drive(OverlapPolicy("auto"), lambda count: StepTimes(0.010 * count, 0.006), 100)
    assert chosen.count(2) == 2
    assert set(chosen) == {1, 2}


def test_a_router_that_hardly_waits_never_tries() -> None:
    assert set(drive(OverlapPolicy("auto"), Machine(0.010, 0.0005, 0.001).step)) == {1}


def test_a_gain_below_the_noise_changes_nothing() -> None:
    chosen = drive(OverlapPolicy("auto"), lambda count: StepTimes(0.0100 if count == 1 else 0.0098, 0.004))
    assert chosen[-1] == 1


def test_a_few_slow_steps_change_nothing() -> None:
    network = Machine(compute_s=0.010, wait_s=0.005, overhead_s=0.001)
    number = 0

    def step(count: int) -> StepTimes:
        nonlocal number
        number += 1
        times = network.step(count)
        return StepTimes(times.step_s * 5, times.wait_s) if number % 7 == 0 else times

    assert drive(OverlapPolicy("auto"), step)[-100:].count(2) > 80


def test_it_follows_a_network_that_changes() -> None:
    policy = OverlapPolicy("auto")
    slow, quick = Machine(0.010, 0.005, 0.001), Machine(0.010, 0.0002, 0.001)
    assert drive(policy, quick.step, 2000)[-1] == 1
    assert drive(policy, slow.step, 200)[-50:].count(2) > 40
    assert drive(policy, quick.step, 1000)[-50:].count(1) > 40


def test_sizes_are_judged_apart() -> None:
    policy = OverlapPolicy("auto")
    single = StepSize(1, 1)
    for _ in range(MANY):
        drive(policy, Machine(0.010, 0.005, 0.001).step, 1)
        drive(policy, lambda count: StepTimes(0.004 * count, 0.002), 1, single)
    assert policy.choose(DECODE) == 2
    assert policy.choose(single) == 1


def test_a_step_that_cannot_be_split_is_no_obstacle() -> None:
    policy = OverlapPolicy("auto")
    for _ in range(MANY):
        policy.choose(StepSize(1, 1))
        policy.record(StepSize(1, 1), 1, StepTimes(0.010, 0.005))
    assert drive(policy, Machine(0.010, 0.005, 0.001).step)[-1] in (1, 2)


@pytest.mark.parametrize(("setting", "count"), [("off", 1), (1, 1), (3, 3)])
def test_a_setting_is_obeyed(setting: object, count: int) -> None:
    policy = OverlapPolicy(parse_micro_batches(setting))
    assert set(drive(policy, Machine(0.010, 0.005, 0.001).step)) == {count}


def test_settings_are_read() -> None:
    assert [parse_micro_batches(value) for value in ("auto", "off", "2", 4, False)] == ["auto", "off", 2, 4, "off"]
    for wrong in ("0", "9", "-1", "on", "", 1.5, True):
        with pytest.raises(ValueError, match="expected auto, off or a number of 1 to 8"):
            parse_micro_batches(wrong)
