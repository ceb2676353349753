import numpy as np
import numpy.typing as npt
import pytest

from experts.load_meter import COUNT_WINDOW_S, WINDOW_S, LoadMeter, load_to_proto, make_load_meter
from experts.model_config import ModelConfig
from tests.random_checkpoint import build_config

EXPERTS = np.array([2, 0, 2], dtype=np.int32)


def make_meter() -> LoadMeter:
    return LoadMeter((1, 2, 5), 4, 0.0)


def note(
    meter: LoadMeter,
    received_s: float,
    started_s: float,
    ended_s: float,
    layer_id: int = 2,
    experts: npt.NDArray[np.int32] = EXPERTS,
) -> None:
    meter.note_frame(layer_id, experts, received_s=received_s, started_s=started_s, ended_s=ended_s)


def test_nothing_happened():
    snapshot = make_meter().take_snapshot(0.0)
    assert (snapshot.busy_share, snapshot.queue_ms, snapshot.num_frames) == (0.0, 0.0, 0)
    assert snapshot.pairs.shape == (3, 4)


def test_busy_share_and_queue_delay():
    meter = make_meter()
    note(meter, 1.0, 1.0, 2.0)
    note(meter, 1.5, 2.0, 3.0)
    snapshot = meter.take_snapshot(4.0)
    assert snapshot.window_s == pytest.approx(4.0)
    assert snapshot.busy_share == pytest.approx(0.5)
    assert snapshot.queue_ms == pytest.approx(250.0)
    assert snapshot.max_queue_ms == pytest.approx(500.0)
    assert (snapshot.num_frames, snapshot.num_pairs) == (2, 6)


def test_frames_joined_into_one_call_are_busy_once():
    meter = make_meter()
    for received_s in (0.0, 0.5, 0.9):
        note(meter, received_s, 1.0, 2.0)
    assert meter.take_snapshot(4.0).busy_share == pytest.approx(0.25)


def test_what_is_older_than_the_window_is_forgotten():
    meter = make_meter()
    note(meter, 0.0, 0.0, 1.0)
    assert meter.take_snapshot(5.0).busy_share == pytest.approx(0.2)
    later = meter.take_snapshot(1.0 + 2 * WINDOW_S)
    assert (later.busy_share, later.num_frames) == (0.0, 0)
    assert WINDOW_S * 0.9 < later.window_s <= WINDOW_S


def test_busy_all_the_time_is_one():
    meter = make_meter()
    for second in range(30):
        note(meter, second, second, second + 1)
    assert meter.take_snapshot(30.0).busy_share == pytest.approx(1.0, abs=0.01)


def test_pairs_are_counted_by_layer_and_expert():
    meter = make_meter()
    note(meter, 0, 0, 1)
    note(meter, 1, 1, 2, layer_id=5, experts=np.array([3], dtype=np.int32))
    note(meter, 2, 2, 3, layer_id=77)
    pairs = meter.take_snapshot(3.0).pairs
    assert pairs.dtype == np.int64
    assert pairs.tolist() == [[0, 0, 0, 0], [1, 0, 2, 0], [0, 0, 0, 1]]


def test_counts_fade_with_the_count_window():
    meter = make_meter()
    note(meter, 0, 0, 1)
    half_s = COUNT_WINDOW_S / 2
    assert meter.take_snapshot(half_s + 1).pairs.sum() == 3
    assert meter.take_snapshot(half_s + 1).count_window_s == pytest.approx(half_s + 1)
    assert meter.take_snapshot(2 * half_s + 2).pairs.sum() == 0
    note(meter, 2 * half_s + 2, 2 * half_s + 2, 2 * half_s + 3)
    assert meter.take_snapshot(10 * COUNT_WINDOW_S).pairs.sum() == 0


def test_the_message_leaves_out_layers_without_pairs():
    config = build_config(n_routed_experts=4, n_group=1, topk_group=1, num_hidden_layers=3, first_k_dense_replace=1)
    meter = make_load_meter(ModelConfig.from_dict(config), 0.0)
    note(meter, 0.0, 1.0, 2.0)
    message = load_to_proto(meter, 7, 4.0, with_pairs=True)
    assert (message.incarnation, message.num_pairs) == (7, 3)
    assert message.busy_share == pytest.approx(0.25)
    assert [(layer.layer_id, list(layer.pairs)) for layer in message.layers] == [(2, [1, 0, 2, 0])]
    assert not load_to_proto(meter, 7, 4.0, with_pairs=False).layers
