"""Settings: flags over environment over file, and a refusal that names the field."""

from pathlib import Path

import pytest

from trimtab_controller import config
from trimtab_protos.errors import InvalidRequest


def test_flags_go_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "controller.toml").write_text(
        'advertise = ["192.0.2.1"]\napi_port = 1001\njoin_port = 1002\ngateway_port = 1003\n'
    )
    monkeypatch.setenv("TRIMTAB_JOIN_PORT", "2002")
    monkeypatch.setenv("TRIMTAB_GATEWAY_PORT", "2003")
    settings = config.load(data_dir=tmp_path, gateway_port=3003)
    assert (settings.api_port, settings.join_port, settings.gateway_port) == (1001, 2002, 3003)
    assert settings.api_urls == ("https://192.0.2.1:1001",)


def test_the_data_directory_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "controller.toml").write_text('advertise = ["192.0.2.7"]\n')
    monkeypatch.setenv("TRIMTAB_DATA_DIR", str(tmp_path))
    assert config.load().advertise == ("192.0.2.7",)


def test_addresses_are_given_with_commas_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_ADVERTISE", "192.0.2.1, 2001:db8::1,control.example")
    settings = config.load(data_dir=tmp_path)
    assert settings.advertise == ("192.0.2.1", "2001:db8::1", "control.example")
    assert settings.gateway_addresses == ("192.0.2.1:8444", "[2001:db8::1]:8444", "control.example:8444")


def test_the_settings_of_the_cli_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRIMTAB_URL", "TRIMTAB_TOKEN", "TRIMTAB_CA", "TRIMTAB_PROJECT"):
        monkeypatch.setenv(name, "whatever")
    assert config.load(data_dir=tmp_path).api_port == 8443


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({"api_port": 0}, "api_port"),
        ({"gateway_port": 70_000}, "gateway_port"),
        ({"advertise": "not an address"}, "advertise"),
        ({"advertise": ""}, "advertise"),
        ({"lease_ttl_s": 5}, "settings"),
        ({"lease_ttl_s": 9, "lease_renew_s": 5}, "settings"),
        ({"log_level": "loud"}, "log_level"),
        ({"image_url_networks": "10.20.0.1/16"}, "image_url_networks"),
        ({"api_certificate": "/tmp/a.pem"}, "settings"),
        ({"ovn_northbound": "192.0.2.10:6641"}, "ovn_northbound"),
        ({"ovn_northbound": "tcp:192.0.2.10:6641,http://x"}, "ovn_northbound"),
        ({"ovn_northbound": "ssl:192.0.2.10:6641", "ovn_certificate": "/tmp/a.pem"}, "settings"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, flags: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        config.load(data_dir=tmp_path, **flags)
    assert caught.value.context["field"] == field


def test_ovns_database_is_one_or_a_cluster(tmp_path: Path) -> None:
    for endpoint in ("unix:/run/ovn/ovnnb_db.sock", "tcp:192.0.2.10:6641,tcp:192.0.2.11:6641", "tcp:[2001:db8::1]:6641"):
        assert config.load(data_dir=tmp_path, ovn_northbound=endpoint).ovn_northbound == endpoint


def test_a_misspelt_name_in_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "controller.toml").write_text("api_prot = 1\n")
    with pytest.raises(InvalidRequest, match="api_prot"):
        config.load(data_dir=tmp_path)
    (tmp_path / "controller.toml").write_text("api_port = \n")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        config.load(data_dir=tmp_path)


def test_a_file_that_was_written_is_read_back(tmp_path: Path) -> None:
    url = "postgresql+psycopg://u@h/name"
    settings = config.load(data_dir=tmp_path, advertise="192.0.2.1", api_port=9, database_url=url)
    config.write_file(settings)
    again = config.load(data_dir=tmp_path)
    assert (again.api_port, again.advertise, again.effective_database_url) == (9, ("192.0.2.1",), url)


def test_a_data_directory_too_deep_for_a_socket_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="too long"):
        _ = config.load(data_dir=tmp_path / ("deep" * 30)).effective_redis_url


def test_the_broker_follows_redis(tmp_path: Path) -> None:
    assert config.load(data_dir="/d").broker_url == "redis+socket:///d/redis/redis.sock"
    assert config.load(data_dir="/d", redis_url="redis://h:1/2").broker_url == "redis://h:1/2"
