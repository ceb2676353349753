"""A group grows by its own load and shrinks when that has gone, on real Ray; the other group stays as it is."""

from pathlib import Path

import pytest

from tests.ray.serve_process import ServeProcess, wait_for
from tests.scenarios.stream_load import StreamLoad
from tests.scenarios.test_scaling import list_ids

pytestmark = pytest.mark.timeout(240)

# A busy share that any stream exceeds, so that the test does not depend on the speed of the machine.
RULES = '{"g1": {"max": 2, "busy_share": 0.001, "grow_after_s": 1, "shrink_after_s": 1, "cooldown_s": 0}}'


def test_a_group_with_a_rule_grows_under_load_and_shrinks_afterwards(tmp_path: Path):
    serve = ServeProcess(tmp_path, "--groups", "2", "--expert-threads", "1", "--autoscale", RULES)
    try:
        serve.wait_ready()
        with StreamLoad(serve.url, 1, 24) as load:
            wait_for(lambda: _get_ids(serve) == ["g0-0", "g1-0", "g1-1"], 60)
        assert load.failures == []
        wait_for(lambda: _get_ids(serve) == ["g0-0", "g1-0"], 60)
        result = serve.run_command("events", "--url", serve.url)
        assert result.returncode == 0, result.stderr
        assert "group g1: change (from g1-0 to g1-0,g1-1: autoscaled: busy" in result.stdout
        assert "group g1: change (from g1-0,g1-1 to g1-0: autoscaled: busy" in result.stdout
    finally:
        serve.close()


def _get_ids(serve: ServeProcess) -> list[str]:
    """Of a cluster at rest; empty while something changes."""
    status = serve.fetch_status()
    return list_ids(status) if status["settled"] else []
