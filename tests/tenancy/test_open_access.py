"""An API without keys listens to this machine only, unless that is said to be wanted."""

import pytest

from router.tenancy.errors import OpenToNetwork
from router.tenancy.open_access import check_open_access

LOOPBACK = ["127.0.0.1", "127.8.8.8", "::1", "localhost"]
NETWORK = ["0.0.0.0", "::", "", "10.0.0.1", "shoal.example", "192.168.0.1", "localhost.example"]


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_is_open(host: str) -> None:
    check_open_access(host, has_keys=False, is_allowed=False)


@pytest.mark.parametrize("host", NETWORK)
def test_the_network_needs_keys_or_a_word(host: str) -> None:
    with pytest.raises(OpenToNetwork, match="--no-auth"):
        check_open_access(host, has_keys=False, is_allowed=False)
    check_open_access(host, has_keys=True, is_allowed=False)
    check_open_access(host, has_keys=False, is_allowed=True)
