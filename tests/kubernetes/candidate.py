"""A controller without Ray, as a process: once it leads it wants g0 to have a given number of pods.

    python -m tests.kubernetes.candidate NAMESPACE IDENTITY NUM_PODS

Prints a line when it leads, and ends with code 1 when it has lost the Lease. KUBECONFIG names the server.
"""

import os
import sys
import time
from typing import NoReturn

from cluster.fleet import GroupDemand
from cluster.kubernetes_api import connect
from cluster.kubernetes_backend import KubernetesBackend
from cluster.leader_lease import LeaderLease, LeaseTimes
from tests.kubernetes.ray_cluster import NAME

TIMES = LeaseTimes(duration_s=3, renew_within_s=2.0, retry_s=0.3)


def main(namespace: str, identity: str, num_pods: int) -> NoReturn:
    api = connect(namespace, NAME)
    lease = LeaderLease(api, f"{NAME}-controller", identity, time.monotonic, TIMES)
    backend = KubernetesBackend(api, "controller", lease.is_held)
    lease.start()
    lease.acquired.wait()
    print(f"leading {identity}", flush=True)
    backend.set_demand({"g0": GroupDemand(num_pods, frozenset())}, GroupDemand(1, frozenset()))
    backend.start()
    lease.lost.wait()
    # As `shoal controller` does: no thread of it may go on.
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
