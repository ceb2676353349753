"""Figures of `shoal bench` from outcomes written down by hand."""

import pytest

from cluster.bench_statistics import Outcome, compute_percentile, meets, parse_slo, summarize
from cluster.errors import SettingsError

# Due at 1 s, first token after 200 ms, then 4 more in 400 ms, closed 50 ms later.
GOOD = Outcome(
    due_s=1.0, ended_s=1.65, first_s=1.2, last_s=1.6, gaps_s=(0.1, 0.1, 0.2), num_prompt_tokens=10, num_output_tokens=5
)
FAILED = Outcome(due_s=1.0, ended_s=1.5, error="HTTP 429: overloaded")


def test_latencies_count_from_when_a_request_was_due() -> None:
    report = summarize([GOOD], 2.0, {})
    assert report["ttft_ms"] == pytest.approx({"mean": 200, "p50": 200, "p90": 200, "p99": 200})
    assert report["tpot_ms"]["mean"] == pytest.approx(100)
    assert report["e2e_ms"]["mean"] == pytest.approx(650)
    assert report["itl_ms"]["p50"] == pytest.approx(100)
    assert report["itl_ms"]["mean"] == pytest.approx(400 / 3, abs=0.01)


def test_rates_count_answered_requests_over_the_whole_run() -> None:
    report = summarize([GOOD, GOOD, FAILED], 2.0, {})
    assert report["requests_per_s"] == 1.0
    assert report["output_tokens_per_s"] == 5.0
    assert report["total_tokens_per_s"] == 15.0
    assert (report["num_requests"], report["num_answered"]) == (3, 2)
    assert report["errors"] == {"HTTP 429: overloaded": 1}


def test_goodput_counts_requests_that_meet_every_limit() -> None:
    report = summarize([GOOD, FAILED], 2.0, parse_slo("ttft=250,tpot=101,e2e=1s"))
    assert report["goodput_requests_per_s"] == 0.5
    assert report["goodput_fraction"] == 0.5
    assert not meets(GOOD, parse_slo("ttft=150"))
    assert not meets(GOOD, parse_slo("tpot=99"))
    assert not meets(GOOD, parse_slo("e2e=0.6s"))


def test_an_answer_of_one_token_has_no_time_per_token_to_miss() -> None:
    single = Outcome(due_s=0.0, ended_s=0.1, first_s=0.1, last_s=0.1, num_output_tokens=1)
    assert meets(single, parse_slo("tpot=1"))
    assert summarize([single], 1.0, {})["tpot_ms"] is None


def test_a_run_in_which_nothing_was_answered_has_no_latencies() -> None:
    report = summarize([FAILED], 0.0, parse_slo("ttft=1"))
    assert report["ttft_ms"] is None
    assert report["goodput_fraction"] == 0.0


def test_percentiles_lie_between_neighbours() -> None:
    assert compute_percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert compute_percentile([1.0, 2.0, 3.0, 4.0], 100) == 4.0
    assert compute_percentile([5.0], 99) == 5.0
    with pytest.raises(ValueError):
        compute_percentile([], 50)


@pytest.mark.parametrize("text", ["", "ttft", "ttft=x", "itl=5", "ttft=5m"])
def test_an_objective_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        parse_slo(text)
