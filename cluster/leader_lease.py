"""Who of several controllers leads: a Lease that the leader renews, and that nobody else takes before it ran out.

Times are measured on each process's own clock, as client-go does: a Lease has run out when its content has not changed
for its whole duration since it was first seen so. The leader counts from before its last renewal was sent, and stops
after RENEW_WITHIN_S, which is shorter: so it stops before another can begin, whatever the network does.

The client's LeaderElection is not used: it has no way to ask whether the lease is held now, which every write needs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cluster.errors import ApiConflict, ApiNotFound, KubernetesError
from cluster.kubernetes_api import KubernetesApi

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """Seconds. The defaults are those of Kubernetes' own components."""

    duration_s: int = 15
    renew_within_s: float = 10.0
    retry_s: float = 2.0


class LeaderLease:
    """Owns one thread once started. get_holder and is_held may be called from any."""

    def __init__(
        self,
        api: KubernetesApi,
        name: str,
        identity: str,
        clock: Callable[[], float],
        times: LeaseTimes = LeaseTimes(),
    ) -> None:
        """clock: seconds, monotonic. identity: unique among all controllers that there are."""
        self._api = api
        self._name = name
        self._identity = identity
        self._clock = clock
        self._times = times
        self._held_until_s = 0.0
        # The spec as it was first seen, and when.
        self._seen: tuple[dict[str, Any], float] | None = None
        self._stopped = threading.Event()
        self.acquired = threading.Event()
        # Set once another has taken it: whoever led before must not go on.
        self.lost = threading.Event()
        # When the API server last answered, by the clock; None: never yet.
        self.answered_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="leader lease", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def is_held(self) -> bool:
        """Whether nobody else can lead now."""
        return self._clock() < self._held_until_s and not self.lost.is_set()

    def get_holder(self) -> str | None:
        """Identity of whoever was seen to hold it last; None if nobody."""
        return None if self._seen is None else self._seen[0].get("holderIdentity") or None

    def release(self) -> None:
        """Stop renewing and let another have it at once. Nothing may be written any more when this is called."""
        self._stopped.set()
        self._thread.join(self._times.renew_within_s)
        was_held, self._held_until_s = self.is_held(), 0.0
        if not was_held:
            return
        try:
            lease = self._api.fetch_lease(self._name)
            if lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                self._api.replace_lease(lease)
                logger.info("lease handed over")
        except KubernetesError as error:
            logger.warning("lease not handed over, another controller waits until it has run out: %s", error)

    def _run(self) -> None:
        while not self._stopped.is_set() and not self.lost.is_set():
            try:
                self.try_once()
            except KubernetesError as error:
                logger.warning("lease %s: %s", self._name, error)
            except Exception:
                logger.exception("lease %s", self._name)
            self._stopped.wait(self._times.retry_s)

    def try_once(self) -> bool:
        """Take or renew it if possible; whether it is held. Raises KubernetesError."""
        asked_s = self._clock()
        try:
            lease = self._api.fetch_lease(self._name)
        except ApiNotFound:
            self.answered_s = self._clock()
            return self._write(asked_s, None)
        except KubernetesError:
            # What could not be renewed by anybody has not run out: the duration counts anew once there are answers.
            self._seen = None
            raise
        self.answered_s = self._clock()
        spec = lease.get("spec") or {}
        if self._seen is None or self._seen[0] != spec:
            self._seen = (spec, self._clock())
        holder = spec.get("holderIdentity")
        if self.acquired.is_set() and holder != self._identity:
            logger.error("lease %s is held by %s now", self._name, holder or "nobody")
            self.lost.set()
            return False
        is_free = not holder or self._clock() - self._seen[1] >= float(spec.get("leaseDurationSeconds") or 0)
        if holder != self._identity and not is_free:
            return False
        return self._write(asked_s, lease)

    def _announce(self) -> None:
        logger.info("leading identity=%s", self._identity)
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "name": self._name}
        try:
            self._api.create_event(lease, "LeaderElected", f"{self._identity} leads")
        except KubernetesError as error:
            logger.warning("no Event was written: %s", error)

    def _write(self, asked_s: float, lease: Mapping[str, Any] | None) -> bool:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        before = dict((lease or {}).get("spec") or {})
        is_new = before.get("holderIdentity") != self._identity
        spec = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._times.duration_s,
            "acquireTime": now if is_new else before.get("acquireTime") or now,
            "renewTime": now,
            "leaseTransitions": int(before.get("leaseTransitions") or 0) + (1 if lease is not None and is_new else 0),
        }
        try:
            if lease is None:
                written = self._api.create_lease(self._name, spec)
            else:
                written = self._api.replace_lease({**lease, "spec": spec})
        except ApiConflict:
            # Somebody was faster; the next look shows who.
            return False
        self._seen = (written["spec"], self._clock())
        self._held_until_s = asked_s + self._times.renew_within_s
        if not self.acquired.is_set():
            self.acquired.set()
            self._announce()
        return True
