import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import cli
from cluster.settings import ServeSettings
from tests.free_ports import find_free_ports
from tests.random_checkpoint import write_random_checkpoint


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "state"
    monkeypatch.setenv("SHOAL_STATE_DIR", str(folder))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    write_random_checkpoint(folder)
    return folder


def take_port(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def test_every_setting_but_the_secret_has_a_flag():
    options = cli.build_parser().parse_args(["serve"])
    assert options.settings == {}
    arguments = ["serve", "folder"]
    for name in ServeSettings.model_fields:
        if name in ("checkpoint", "admin_token"):
            continue
        choice = {"dtype": "float32", "wire_dtype": "fp8", "combine": "exact", "device": "cpu", "log_level": "debug"}
        choice |= {"numerics": "uniform", "load_from": "peer", "kubernetes_scaling": "ray", "metrics_compat": "vllm"}
        choice |= {"log_format": "json", "reasoning_field": "both"}
        flag = f"--{name.replace('_', '-')}"
        is_switch = ServeSettings.model_fields[name].annotation in (bool, bool | None)
        arguments += [flag] if is_switch else [flag, choice.get(name, "7")]
    parsed = cli.build_parser().parse_args(arguments)
    assert set(parsed.settings) == set(ServeSettings.model_fields) - {"admin_token"}


def test_switches_go_both_ways():
    parse = cli.build_parser().parse_args
    assert parse(["serve", "--no-deterministic"]).settings == {"deterministic": False}
    assert parse(["serve", "--deterministic"]).settings == {"deterministic": True}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve", "--grups", "3"], "did you mean '--groups'"),
        (["serve", "--dtype", "float8"], "invalid choice"),
        (["serve", "--groups", "none"], "groups from the command line"),
        (["serv"], "invalid choice"),
        ([], "required"),
        (["scale", "--url", "http://127.0.0.1:1", "g0"], "'g0' is not GROUP=N"),
        (["scale", "--url", "http://127.0.0.1:1", "g0=-1"], "is not GROUP=N"),
        (["scale", "--url", "http://127.0.0.1:1", "g0=1", "g0=2"], "given twice"),
        (["drain"], "required"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
):
    try:
        code = cli.main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "command", [["status"], ["scale", "g0=2"], ["drain", "g0-0"], ["restart"], ["plan"], ["events"]]
)
def test_commands_without_a_cluster_say_so(command: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main([*command, "--url", "http://127.0.0.1:1"]) == 1
    assert "no running cluster is known for http://127.0.0.1:1" in capsys.readouterr().err


def test_chat_without_a_server_says_so(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["chat", "--url", "http://127.0.0.1:1", "-m", "hello"]) == 1
    assert "does not answer" in capsys.readouterr().err


def test_serve_refuses_a_damaged_checkpoint_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in checkpoint.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    shard = sorted(damaged.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    assert cli.main(["serve", str(damaged)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert shard.name in error


def test_serve_refuses_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["serve", str(tmp_path / "absent")]) == 1
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["--port", "--admin-port"])
def test_serve_refuses_a_taken_port_and_names_the_flag(
    which: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
):
    number, free = find_free_ports(2)
    with take_port(number):
        ports = [which, str(number), "--admin-port" if which == "--port" else "--port", str(free)]
        assert cli.main(["serve", str(checkpoint), *ports]) == 1
    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{number}: address already in use" in error
    assert which in error


def test_serve_refuses_more_groups_than_experts(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["serve", str(checkpoint), "--groups", "4000"]) == 1
    assert "into 4000 expert groups" in capsys.readouterr().err


def test_serve_refuses_a_model_that_does_not_fit(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cluster.preflight.PROCESS_BYTES", 1 << 50)
    assert cli.main(["serve", str(checkpoint), "--port", "0"]) == 2
    assert cli.main(["serve", str(checkpoint), "--port", str(find_free_ports(2)[0])]) == 1
    assert "too little memory: needs about" in capsys.readouterr().err


def test_check_prints_a_report_and_its_verdict(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["check", str(checkpoint), "--json", "--groups", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert len(report["groups"]) == 2
    assert cli.main(["check", str(checkpoint.parent)]) == 1


def test_doctor_finds_a_taken_port_and_says_how_to_mend_it(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    port, _ = find_free_ports(2)  # the second is the admin API's
    with take_port(port):
        code = cli.main(["doctor", str(checkpoint), "--port", str(port), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert code == 1
    assert document["ok"] is False
    failures = [finding for finding in document["findings"] if finding["level"] == "failure"]
    assert [finding["check"] for finding in failures] == ["ports"]
    assert all(finding["remedy"] for finding in failures)


def test_doctor_is_content_here(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor", str(checkpoint), "--port", str(find_free_ports(2)[0])]) == 0
    assert "ready to serve" in capsys.readouterr().out


@pytest.mark.parametrize(
    "module", ["cluster.cli", "cluster.serve_command", "cluster.controller_actor", "router.api.app"]
)
def test_processes_without_tensors_do_not_load_torch(module: str):
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_the_help_of_serve_tells_defaults_that_mean_something(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    assert "(default: 8000)" in text
    assert "Undefined" not in text and "(default: )" not in text
