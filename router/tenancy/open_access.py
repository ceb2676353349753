"""Without keys, whoever reaches the address may use the cluster: only this machine, unless somebody says otherwise."""

from __future__ import annotations

import ipaddress

from router.tenancy.errors import OpenToNetwork


def check_open_access(host: str, *, has_keys: bool, is_allowed: bool) -> None:
    """host: the address to listen on. Raises OpenToNetwork if strangers could use the cluster without a key."""
    if has_keys or is_allowed or is_loopback(host):
        return
    raise OpenToNetwork(
        f"{host or 'every address'} can be reached from the network, and there are no API keys: make some with `shoal "
        "keys create --team NAME` and pass --keys-file, listen on 127.0.0.1, or allow everybody in with --no-auth"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address. Names other than localhost are not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
