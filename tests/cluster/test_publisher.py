import pytest

from cluster import publisher as publisher_module
from cluster.publisher import Publisher
from cluster.records import RouterRecord, StartState, router_key
from tests.cluster.fakes import MemoryStore, make_router

KEY = router_key("r0")


def make_publisher(store: MemoryStore) -> Publisher[RouterRecord]:
    return Publisher(store, KEY, RouterRecord, actor_id="r0", node="here", node_id="node a")


def read(store: MemoryStore) -> RouterRecord:
    return RouterRecord.from_json(store.values[KEY])


def test_a_start_is_published_at_once_and_again_when_ready():
    store = MemoryStore()
    publisher = make_publisher(store)
    assert read(store).state is StartState.STARTING
    publisher.publish_ready(endpoint="127.0.0.1:9")
    assert read(store).state is StartState.READY
    assert read(store).endpoint == "127.0.0.1:9"


def test_incarnation_rises_even_if_the_clock_went_back():
    store = MemoryStore()
    store.publish(make_router("r0", incarnation=2**62))
    assert make_publisher(store).record.incarnation == 2**62 + 1


def test_failed_starts_add_up_and_the_next_one_waits(monkeypatch: pytest.MonkeyPatch):
    slept_s: list[float] = []
    monkeypatch.setattr(publisher_module.time, "sleep", slept_s.append)
    store = MemoryStore()
    for _ in range(4):
        publisher = make_publisher(store)
        publisher.wait_turn()
        publisher.publish_failure(ValueError("line one\nline two"))
    assert read(store).num_failed_starts == 3
    assert read(store).message == "ValueError: line one line two"
    assert slept_s == [0.5, 1.0]


def test_an_unreadable_record_of_the_start_before_does_not_stop_the_next():
    store = MemoryStore()
    store.values[KEY] = b"junk"
    assert make_publisher(store).record.num_failed_starts == 0


def test_progress_is_published_at_a_bounded_rate():
    store = MemoryStore()
    publisher = make_publisher(store)
    for step in range(1000):
        publisher.show_progress(step / 1000)
    assert read(store).load_progress < 0.9
