"""Where actors publish their records: a seam over Ray's internal key-value store.

Reading and writing take about a millisecond and never go through an actor, so a restarted actor's new address is
known as soon as it listens. Every call has a deadline: with the Ray head gone it raises instead of waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from cluster.errors import StoreUnavailable
from cluster.records import RECORD_NAMESPACE

CALL_TIMEOUT_S = 2.0


class RecordStore(Protocol):
    """Synchronous; each method raises StoreUnavailable when the store does not answer in time."""

    def get(self, key: bytes) -> bytes | None: ...

    def get_all(self, prefix: bytes) -> Mapping[bytes, bytes]: ...

    def put(self, key: bytes, value: bytes) -> None: ...

    def delete(self, key: bytes) -> None: ...

    def delete_all(self) -> None: ...


class RayRecordStore:
    """The store of the Ray cluster that this process is connected to."""

    def __init__(self, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s

    def get(self, key: bytes) -> bytes | None:
        return self._call("internal_kv_get", key, RECORD_NAMESPACE)

    def get_all(self, prefix: bytes) -> Mapping[bytes, bytes]:
        keys = self._call("internal_kv_keys", prefix, RECORD_NAMESPACE)
        return self._call("internal_kv_multi_get", keys, RECORD_NAMESPACE) if keys else {}

    def put(self, key: bytes, value: bytes) -> None:
        self._call("internal_kv_put", key, value, True, RECORD_NAMESPACE)

    def delete(self, key: bytes) -> None:
        self._call("internal_kv_del", key, False, RECORD_NAMESPACE)

    def delete_all(self) -> None:
        self._call("internal_kv_del", b"", True, RECORD_NAMESPACE)

    def _call(self, method: str, *args: Any) -> Any:
        from ray.exceptions import RpcError
        from ray.experimental.internal_kv import internal_kv_get_gcs_client

        client = internal_kv_get_gcs_client()
        if client is None:
            raise StoreUnavailable("this process is not connected to Ray")
        try:
            return getattr(client, method)(*args, timeout=self._timeout_s)
        except (RpcError, TimeoutError, ConnectionError) as error:
            raise StoreUnavailable(f"Ray's control service did not answer: {type(error).__name__}") from error
