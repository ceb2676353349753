"""One API server for all tests of this folder, and for each a namespace with a RayCluster, an account and its token."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from cluster.kubernetes_api import KubernetesApi
from tests.kubernetes.account import render_account
from tests.kubernetes.api_server import ApiServer, find_assets
from tests.kubernetes.ray_cluster import NAME, RayClusterObject, build_ray_cluster

_numbers = itertools.count()


@dataclass(frozen=True)
class Place:
    """A namespace of its own. api: with no more rights than the chart's Role gives."""

    server: ApiServer
    namespace: str
    token: str
    api: KubernetesApi
    cluster: RayClusterObject


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    server = ApiServer(find_assets(), tmp_path_factory.mktemp("kubernetes") / "server")
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def place(api_server: ApiServer) -> Place:
    return make_place(api_server)


def make_place(api_server: ApiServer) -> Place:
    """The RayCluster has the groups g0, g1 and g2 with one replica each, and nobody makes pods."""
    namespace = f"test-{next(_numbers)}"
    api_server.make_namespace(namespace)
    token = api_server.make_account(namespace, render_account(namespace))
    cluster = RayClusterObject(api_server.admin, namespace)
    cluster.create(build_ray_cluster({"g0": 1, "g1": 1, "g2": 1}))
    return Place(api_server, namespace, token, api_server.make_api(token, namespace, NAME), cluster)
