from dataclasses import replace

import pytest

from cluster.autoscaler import AutoscaleRule
from cluster.errors import BadRecord
from cluster.planner import Held, Memory
from cluster.records import (
    ControllerRecord,
    ReplicaRecord,
    RouterRecord,
    StartState,
    compute_start_delay_s,
    controller_from_json,
    count_failed_starts,
)
from cluster.spec import build_groups, spec_from_json
from cluster.stored_table import memory_from_json, memory_to_json
from experts.expert_range import ExpertRange
from experts.model_config import ModelConfig
from router.expert_table import ExpertTable, GroupEntry, ReplicaEntry
from tests.cluster.fakes import HOSTED, make_replica, make_router, make_spec
from tests.random_checkpoint import build_config


def test_records_survive_json():
    assert ReplicaRecord.from_json(make_replica("g1-0", 7).to_json()) == make_replica("g1-0", 7)
    assert RouterRecord.from_json(make_router("r0", 3).to_json()) == make_router("r0", 3)
    controller = ControllerRecord(pid=1, node="here", admin_url="http://127.0.0.1:1")
    assert controller_from_json(controller.to_json()) == controller


def test_spec_survives_json():
    assert spec_from_json(make_spec(2, 3).to_json()) == make_spec(2, 3)
    autoscaled = replace(make_spec(), autoscale=(("g*", AutoscaleRule(max_replicas=3)),), autoscale_dry_run=True)
    assert spec_from_json(autoscaled.to_json()) == autoscaled


def test_table_and_digests_survive_json():
    entry = GroupEntry("g0", HOSTED[0], (ReplicaEntry("g0-0", "127.0.0.1:1", 5, "abc", "cpu"),))
    memory = Memory(table=ExpertTable(4, (entry,)), digests={Held("g0", (ExpertRange(1, 2, 0, 3),)): "abc"})
    assert memory_from_json(memory_to_json(memory)) == memory


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"null", b'{"state": "odd"}'])
def test_foreign_bytes_are_refused(data: bytes):
    for parse in (
        ReplicaRecord.from_json,
        RouterRecord.from_json,
        controller_from_json,
        spec_from_json,
        memory_from_json,
    ):
        with pytest.raises(BadRecord):
            parse(data)


def test_groups_cover_every_expert_once():
    config = ModelConfig.from_dict(build_config())
    groups = build_groups(config, 3, 2)
    assert [group.name for group in groups] == ["g0", "g1", "g2"]
    assert groups[1].replica_ids == ("g1-0", "g1-1")
    experts = [expert for group in groups for block in group.hosted for expert in block.expert_ids]
    assert experts == list(range(config.n_routed_experts))


def test_starts_that_never_became_ready_are_counted():
    assert count_failed_starts(None, 0.0) == 0
    failed = make_replica("g0-0", state=StartState.FAILED, ready_at=None, num_failed_starts=2)
    assert count_failed_starts(failed, 1000.0) == 3
    starting = make_replica("g0-0", state=StartState.STARTING, ready_at=None, num_failed_starts=0)
    assert count_failed_starts(starting, 1000.0) == 1


def test_a_process_that_was_ready_for_long_starts_with_a_clean_slate():
    assert count_failed_starts(make_replica("g0-0", ready_at=100.0, num_failed_starts=4), 111.0) == 0
    assert count_failed_starts(make_replica("g0-0", ready_at=100.0, num_failed_starts=4), 105.0) == 5


def test_restarts_back_off_and_are_bounded():
    delays_s = [compute_start_delay_s(count) for count in range(40)]
    assert delays_s[:2] == [0.0, 0.0]
    assert delays_s == sorted(delays_s)
    assert delays_s[-1] == 30.0
