import json
from pathlib import Path

import pytest

from cluster.errors import SettingsError
from cluster.settings import load_settings, split_threads


def test_flag_beats_environment_beats_yaml_beats_default(tmp_path: Path):
    config = tmp_path / "shoal.yaml"
    config.write_text("groups: 2\nreplicas: 2\nport: 7000\n")

    settings = load_settings(
        {"groups": "3"}, config_file=config, environ={"SHOAL_GROUPS": "5", "SHOAL_REPLICAS": "6", "HOME": "/"}
    )

    assert (settings.groups, settings.replicas, settings.port, settings.routers) == (3, 6, 7000, 1)


@pytest.mark.parametrize(
    ("flags", "environ", "expected"),
    [
        ({"groups": "many"}, {}, "groups from the command line"),
        ({"groups": "0"}, {}, "greater than or equal to 1"),
        ({}, {"SHOAL_PORT": "70000"}, "port from the environment"),
        ({"wire_dtype": "int8"}, {}, "wire_dtype from the command line"),
        ({"micro_batches": "9"}, {}, "expected auto, off or a number of 1 to 8, got '9'"),
        ({"device": "cuda", "deterministic": "true"}, {}, "use device cpu, or --no-deterministic"),
        ({"device": "gpu"}, {}, "device from the command line"),
        ({"port": "8000", "admin_port": "8000"}, {}, "choose another"),
        ({"keys_file": "keys.json", "auth": "false"}, {}, "keys that nobody needs"),
        ({"port": "65535"}, {}, "set admin_port"),
        ({}, {"SHOAL_GROUP": "2"}, "did you mean 'SHOAL_GROUPS'"),
        ({}, {"SHOAL_DETERMINISTIC": "perhaps"}, "deterministic from the environment"),
    ],
)
def test_bad_setting_is_refused_with_source_and_remedy(flags: dict, environ: dict, expected: str):
    with pytest.raises(SettingsError, match=expected) as caught:
        load_settings(flags, environ=environ)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grups: 2\n", "did you mean 'groups'"),
        ("wire-dtype: float32\n", "did you mean 'wire_dtype'"),
        ("- groups\n", "must be a mapping"),
        ("groups: [\n", "not valid YAML"),
        ("groups: nan\n", "groups from the file"),
        ("1: 2\n", "unknown setting 1"),
    ],
)
def test_bad_yaml_is_refused(text: str, expected: str, tmp_path: Path):
    config = tmp_path / "shoal.yaml"
    config.write_text(text)
    with pytest.raises(SettingsError, match=expected):
        load_settings({}, config_file=config, environ={})


def test_missing_yaml_is_refused(tmp_path: Path):
    with pytest.raises(SettingsError, match="No such file"):
        load_settings({}, config_file=tmp_path / "absent.yaml", environ={})


def test_variables_of_a_kubernetes_service_called_shoal_are_no_settings():
    environ = {
        "SHOAL_PORT": "tcp://10.0.0.1:8000",
        "SHOAL_SERVICE_HOST": "10.0.0.1",
        "SHOAL_SERVICE_PORT_HTTP": "8000",
        "SHOAL_PORT_8000_TCP_ADDR": "10.0.0.1",
        "SHOAL_API_SERVICE_HOST": "10.0.0.2",
    }
    assert load_settings({}, environ=environ).port == 8000


def test_admin_token_is_never_shown():
    settings = load_settings({}, environ={"SHOAL_ADMIN_TOKEN": "verysecret"})
    assert "verysecret" not in settings.describe()
    assert "verysecret" not in repr(settings)
    assert settings.admin_token is not None
    assert settings.admin_token.get_secret_value() == "verysecret"


@pytest.mark.parametrize(
    ("groups", "cores", "expected"), [(4, 2, (1, 1)), (4, 16, (4, 8)), (1, 2, (2, 1)), (2, 1, (1, 1))]
)
def test_cores_are_shared_out(groups: int, cores: int, expected: tuple[int, int]):
    assert split_threads(load_settings({"groups": groups}, environ={}), cores) == expected


def test_threads_given_are_kept():
    settings = load_settings({"expert_threads": 3, "router_threads": 5}, environ={})
    assert split_threads(settings, 2) == (3, 5)


def test_url_of_a_wildcard_address_can_be_used():
    settings = load_settings({"host": "0.0.0.0", "port": 80}, environ={})
    assert settings.url == "http://127.0.0.1:80"
    assert settings.admin_url == "http://127.0.0.1:81"


def test_autoscale_rules_come_as_yaml_or_as_text():
    rules = {"g0": {"min": 1, "max": 2}, "g*": {"busy_share": 0.5}}
    for value in (rules, json.dumps(rules), "{g0: {min: 1, max: 2}, 'g*': {busy_share: 0.5}}"):
        settings = load_settings({"autoscale": value}, environ={})
        assert list(settings.autoscale) == ["g0", "g*"]
        assert settings.autoscale["g0"].build_rule().max_replicas == 2


@pytest.mark.parametrize(
    "value", ["7", "{", '{"g0": {"mux": 3}}', '{"g0": {"min": 3, "max": 2}}', '{"g0": {"max": 0}}']
)
def test_bad_autoscale_rules_are_refused(value: str):
    with pytest.raises(SettingsError, match="autoscale"):
        load_settings({"autoscale": value}, environ={})
