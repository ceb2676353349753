"""Fair sharing: the scenarios of the paper (Sheng et al., OSDI 2024, section 5), and what is ours beyond it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.errors import QueueFull
from router.fair_queue import FairQueue
from router.scheduler import Scheduler, SchedulerLimits
from router.sequence import Sequence
from tests.router.in_process import request
from tests.router.simulated_engine import Simulation, Team

# 1,280 tokens of cache: some ten requests of the teams below run at once.
LIMITS = SchedulerLimits(max_num_seqs=16, max_batched_tokens=128, num_blocks=40, max_waiting=10_000)


def always(count: int = 30):
    return lambda _: count


def share_of(simulation: Simulation, name: str, since_s: float = 0.0) -> float:
    start = next(service for at_s, service, _ in simulation.history if at_s >= since_s)
    grown = {team: total - start.get(team, 0.0) for team, total in simulation.service.items()}
    return grown[name] / sum(grown.values())


def test_overload_two_teams_get_the_same_whatever_they_send() -> None:
    simulation = Simulation([Team("red", 64, 32, always(20)), Team("blue", 64, 32, always(200))], LIMITS)
    simulation.run(60)
    assert share_of(simulation, "red", since_s=5) == pytest.approx(0.5, abs=0.02)
    assert simulation.gap("red", "blue") <= simulation.bound()


def test_short_against_long_requests_share_tokens_and_not_turns() -> None:
    simulation = Simulation([Team("short", 16, 16, always()), Team("long", 256, 128, always())], LIMITS)
    simulation.run(100)
    assert share_of(simulation, "short", since_s=5) == pytest.approx(0.5, abs=0.03)
    assert simulation.gap("short", "long") <= simulation.bound()
    assert simulation.finished["short"] > 5 * simulation.finished["long"] > 0


def test_prompts_against_answers_share_what_they_cost() -> None:
    simulation = Simulation([Team("reads", 256, 4, always()), Team("writes", 8, 128, always())], LIMITS)
    simulation.run(100)
    assert share_of(simulation, "reads", since_s=5) == pytest.approx(0.5, abs=0.03)
    assert simulation.gap("reads", "writes") <= simulation.bound()


def test_on_off_a_team_that_comes_back_has_saved_nothing_up() -> None:
    on_off = Team("on-off", 64, 32, lambda at_s: 30 if at_s % 40 < 20 else 0)
    simulation = Simulation([Team("steady", 64, 32, always()), on_off], LIMITS)
    simulation.run(125)
    assert simulation.gap("steady", "on-off") <= simulation.bound()
    for start_s in (45, 85):
        window = [service for at_s, service, _ in simulation.history if start_s <= at_s < start_s + 13]
        grown = {name: window[-1][name] - window[0][name] for name in ("steady", "on-off")}
        assert grown["on-off"] / sum(grown.values()) == pytest.approx(0.5, abs=0.06)


def test_a_lone_team_gets_everything_and_so_does_the_rest_while_others_pause() -> None:
    def throughput(teams: list[Team], *, fair: bool) -> float:
        simulation = Simulation(teams, LIMITS, fair=fair)
        simulation.run(60)
        return simulation.num_tokens / simulation.now_s

    lone = [Team("lone", 64, 32, always())]
    assert throughput(lone, fair=True) >= 0.999 * throughput(lone, fair=False)
    low = Team("low", 64, 32, always(1))
    busy = Simulation([Team("busy", 64, 32, always()), low], LIMITS)
    busy.run(60)
    # One request at a time is less than its half: the other team has what it leaves.
    assert share_of(busy, "busy") > 0.7
    assert busy.num_tokens / busy.now_s >= 0.97 * throughput(lone, fair=True)


@pytest.mark.parametrize("weights", [(1.0, 2.0), (1.0, 4.0)])
def test_weights_hold_within_five_percent(weights: tuple[float, float]) -> None:
    teams = [Team("red", 64, 32, always(), weights[0]), Team("blue", 32, 64, always(), weights[1])]
    simulation = Simulation(teams, replace(LIMITS, num_blocks=80, max_num_seqs=32))
    simulation.run(100)
    expected = weights[0] / sum(weights)
    assert share_of(simulation, "red", since_s=5) == pytest.approx(expected, rel=0.05)
    assert simulation.gap("red", "blue", weights) <= simulation.bound()


def test_throughput_is_that_of_first_come_first_served() -> None:
    teams = [
        Team("short", 16, 16, always(10)), Team("long", 256, 128, always()), Team("some", 64, 32, always(2)),
        Team("on-off", 64, 32, lambda at_s: 30 if at_s % 20 < 10 else 0),
    ]  # fmt: skip
    rates: list[float] = []
    for fair in (True, False):
        simulation = Simulation(teams, LIMITS, fair=fair)
        simulation.run(60)
        rates.append(sum(simulation.service.values()) / simulation.now_s)
    assert rates[0] >= 0.95 * rates[1]


def test_two_routers_share_as_one_where_they_hear_of_each_other() -> None:
    """red can use one router only, blue both: alone, the routers would leave red a third."""
    teams = [Team("red", 64, 32, always(), only_router=0), Team("blue", 64, 32, always(60))]
    shares: list[float] = []
    for exchange_every_s in (0.25, None):
        simulation = Simulation(teams, LIMITS, num_routers=2, exchange_every_s=exchange_every_s)
        simulation.run(60)
        shares.append(share_of(simulation, "red", since_s=5))
        if exchange_every_s is not None:
            assert simulation.gap("red", "blue") <= simulation.bound()
    assert shares[0] == pytest.approx(0.5, rel=0.05) and shares[1] < 0.4


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_weights_hold_over_two_routers(weight: float) -> None:
    teams = [Team("red", 64, 32, always(60), weight), Team("blue", 32, 64, always(60))]
    simulation = Simulation(
        teams, replace(LIMITS, num_blocks=80, max_num_seqs=32), num_routers=2, exchange_every_s=0.25
    )
    simulation.run(60)
    assert share_of(simulation, "red", since_s=5) == pytest.approx(weight / (weight + 1), rel=0.05)


def test_a_short_request_of_another_team_starts_at_the_next_turn_whatever_runs() -> None:
    flood = Team("flood", 200, 500, always(500))
    other = Team("other", 16, 8, always(0))
    simulation = Simulation([flood, other], LIMITS)
    simulation.run(30)
    assert len(simulation.schedulers[0].running) > 1
    short = simulation.submit(other)
    rounds = len(simulation.history)
    simulation.run(2)
    # The step that was under way when it came, and then its own.
    assert simulation.started[short] <= simulation.history[rounds + 1][0]
    assert short.num_generated == 8


def test_a_running_request_of_a_small_team_is_not_the_one_to_give_way() -> None:
    simulation = Simulation([Team("flood", 100, 300, always(50)), Team("small", 100, 300, always(1))], LIMITS)
    simulation.run(60)
    preempted = simulation.schedulers[0].counters.num_preemptions
    assert preempted > 0
    small = [each for each in simulation.sent if each.request.fairness_key == "small"]
    waits = [simulation.started[each] - simulation.sent[each] for each in small if each in simulation.started]
    assert len(waits) > 5 and max(waits) < 0.1
    assert share_of(simulation, "small", since_s=5) > 0.1


def test_urgent_requests_go_first_and_batch_ones_get_what_is_left() -> None:
    urgent = Team("red", 32, 16, lambda at_s: 3 if at_s >= 20 else 0, priority=-1)
    batch = Team("blue", 64, 64, always(40), priority=1)
    simulation = Simulation([urgent, batch], LIMITS)
    simulation.run(40)
    waits = [
        simulation.started[each] - simulation.sent[each] for each in simulation.started if each.request.priority == -1
    ]
    assert len(waits) > 50 and max(waits) < 0.1
    assert simulation.finished["blue"] > 0


def test_batch_requests_finish_although_urgent_ones_never_end() -> None:
    teams = [Team("red", 64, 32, always(), priority=-1), Team("blue", 64, 32, always(3), priority=1)]
    starved = Simulation(teams, LIMITS)
    starved.run(60)
    assert starved.finished["blue"] == 0
    aged = Simulation(teams, LIMITS, ageing_s=5.0)
    aged.run(60)
    assert aged.finished["blue"] > 3


def test_idle_time_used_by_batch_jobs_is_not_held_against_a_team() -> None:
    teams = [
        Team("red", 64, 32, lambda at_s: 30 if at_s >= 15 else 0),
        Team("blue", 64, 32, lambda at_s: 30 if at_s >= 15 else 0),
        Team("blue", 64, 32, lambda at_s: 30 if at_s < 15 else 0, priority=1),
    ]
    simulation = Simulation(teams, LIMITS)
    simulation.run(45)
    assert share_of(simulation, "red", since_s=18) == pytest.approx(0.5, abs=0.04)


def asked(name: str, num_prompt: int = 4, max_tokens: int = 4, **overrides: object) -> Sequence:
    prompt = list(range(num_prompt))
    return Sequence(request=request(prompt, max_tokens, fairness_key=name, **overrides), token_ids=prompt)


def test_one_team_fills_the_queue_only_so_far_that_another_finds_a_place() -> None:
    scheduler = Scheduler(replace(LIMITS, max_waiting=16), FairQueue(lambda: 0.0))
    for _ in range(8):
        scheduler.add(asked("flood"))
    with pytest.raises(QueueFull, match="8 requests are waiting already, 8 of them of this team"):
        scheduler.add(asked("flood", priority=1))
    for _ in range(4):
        scheduler.add(asked("other"))
    scheduler.add(asked("flood", num_answer_tokens=2))  # what another router had begun


def test_what_another_router_had_begun_goes_first() -> None:
    queue = FairQueue(lambda: 0.0)
    new, begun = asked("red"), asked("blue", num_answer_tokens=2)
    queue.push(new)
    queue.push(begun)
    assert queue.peek() is begun


def test_a_request_that_is_cancelled_pays_for_what_it_used_and_no_more() -> None:
    queue = FairQueue(lambda: 0.0)
    scheduler = Scheduler(LIMITS, queue)
    long = asked("red", num_prompt=600)
    scheduler.add(long)
    scheduler.schedule()
    assert queue.list_service()[0].service == 600
    scheduler.advance(long, 128)
    scheduler.remove(long)
    assert queue.list_service()[0].service == 128
    assert not scheduler.running and not scheduler.waiting


def test_what_the_cache_had_costs_nothing() -> None:
    queue = FairQueue(lambda: 0.0)
    scheduler = Scheduler(LIMITS, queue)
    for _ in range(2):
        each = asked("red", num_prompt=100, max_tokens=1)
        scheduler.add(each)
        scheduler.schedule()
        each.append(1)
        scheduler.advance(each, 100)
        scheduler.remove(each)
    assert queue.list_service()[0].service == 100 + 2 + 4 + 2
