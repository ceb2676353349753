import pytest

from cluster.errors import BadRecord
from cluster.event_log import MAX_EVENTS, MAX_REASON_CHARACTERS, EventLog


def test_events_come_in_order_after_a_sequence_number():
    log = EventLog(lambda: 5.0)
    log.add("replica g0-0", "create", "why\nnot")
    log.add("replica g0-0", "ready", "x" * 10_000)
    first, second = log.get_after(0)
    assert first == {"sequence": 1, "time": 5.0, "object": "replica g0-0", "action": "create", "reason": "why not"}
    assert len(second["reason"]) == MAX_REASON_CHARACTERS
    assert log.get_after(1) == [second]
    assert log.get_after(2) == []


def test_the_ring_is_bounded_and_numbers_go_on():
    log = EventLog(lambda: 5.0)
    for _ in range(MAX_EVENTS + 10):
        log.add("a", "b", "c")
    events = log.get_after(0)
    assert len(events) == MAX_EVENTS
    assert events[0]["sequence"] == 11


def test_a_successor_goes_on_and_keeps_what_it_has_seen_itself():
    log = EventLog(lambda: 5.0)
    log.add("a", "first", "")
    successor = EventLog(lambda: 6.0)
    successor.add("a", "second", "")
    successor.restore(log.to_json())
    assert [(event["sequence"], event["action"]) for event in successor.get_after(0)] == [(1, "first"), (2, "second")]


@pytest.mark.parametrize("junk", [b"", b"[]", b"{}", b'{"next": 1, "events": [{}]}'])
def test_junk_is_refused(junk: bytes):
    with pytest.raises(BadRecord):
        EventLog(lambda: 0.0).restore(junk)
