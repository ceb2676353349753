"""The ledger: a database of what requests used, by team, key and model. SQLite by default, PostgreSQL by URL.

A record is kept once, by its id. After a while (retention) records are added up by day, which keeps every number that
reports need. The schema has a version; opening a ledger brings it up to date.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from router.tenancy.errors import LedgerError
from router.tenancy.usage import SECONDS_PER_DAY, UsageRecord

GroupKey = Literal["team", "key_id", "model", "day"]
GROUP_KEYS: tuple[GroupKey, ...] = ("team", "key_id", "model", "day")
SUMS = ("tokens_in", "tokens_cached", "tokens_out", "router_us", "expert_us")
# How long a connection waits for a database that another process writes, or that is away.
_WAIT_S = 10
# Any number, but the same in all processes: held while a schema is changed.
_POSTGRES_LOCK = 7_420_311
# Of a connection that only reads.
_READS = "shoal_reads"

_METADATA = sa.MetaData()
_USAGE = sa.Table(
    "usage",
    _METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("request_id", sa.Text, nullable=False),
    sa.Column("team", sa.Text, nullable=False),
    sa.Column("key_id", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("ended_at", sa.Double, nullable=False),
    sa.Column("day", sa.BigInteger, nullable=False),
    *(sa.Column(name, sa.BigInteger, nullable=False) for name in SUMS),
)
_DAYS = sa.Table(
    "usage_days",
    _METADATA,
    *(sa.Column(name, sa.Text, primary_key=True) for name in ("team", "key_id", "model")),
    sa.Column("day", sa.BigInteger, primary_key=True),
    sa.Column("num_requests", sa.BigInteger, nullable=False),
    *(sa.Column(name, sa.BigInteger, nullable=False) for name in SUMS),
)
_VERSION = sa.Table("ledger_version", _METADATA, sa.Column("version", sa.Integer, nullable=False))


# What brings a schema from version i to i + 1, as every database here understands it. To be added to, never changed.
MIGRATIONS: Sequence[Sequence[str]] = (
    (
        "CREATE TABLE usage (id TEXT PRIMARY KEY, request_id TEXT NOT NULL, team TEXT NOT NULL, key_id TEXT NOT NULL, "
        "model TEXT NOT NULL, outcome TEXT NOT NULL, started_at DOUBLE PRECISION NOT NULL, "
        "ended_at DOUBLE PRECISION NOT NULL, day BIGINT NOT NULL, tokens_in BIGINT NOT NULL, "
        "tokens_cached BIGINT NOT NULL, tokens_out BIGINT NOT NULL, router_us BIGINT NOT NULL, "
        "expert_us BIGINT NOT NULL)",
    ),
    # Retention, and with it reports over what is kept by day only.
    (
        "CREATE TABLE usage_days (team TEXT NOT NULL, key_id TEXT NOT NULL, model TEXT NOT NULL, day BIGINT NOT NULL, "
        "num_requests BIGINT NOT NULL, tokens_in BIGINT NOT NULL, tokens_cached BIGINT NOT NULL, "
        "tokens_out BIGINT NOT NULL, router_us BIGINT NOT NULL, expert_us BIGINT NOT NULL, "
        "PRIMARY KEY (team, key_id, model, day))",
        "CREATE INDEX usage_day ON usage (day)",
        "CREATE INDEX usage_team_ended_at ON usage (team, ended_at)",
    ),
)


@dataclass(frozen=True, slots=True)
class UsageSum:
    """Of all records that are equal in what they were grouped by; what they were not grouped by is None. day: since
    the epoch."""

    team: str | None
    key_id: str | None
    model: str | None
    day: int | None
    num_requests: int
    tokens_in: int
    tokens_cached: int
    tokens_out: int
    router_us: int
    expert_us: int


class Ledger:
    """Used by one thread. Every method raises LedgerError if the database does not do as asked."""

    def __init__(self, url: str, *, must_exist: bool = False) -> None:
        """Opens it, brings it up to date, and creates it unless it must exist. url: as SQLAlchemy takes it,
        sqlite:///FILE or postgresql://USER@HOST/DATABASE."""
        self._engine = _create_engine(url)
        file = self._engine.url.database
        if must_exist and self._engine.dialect.name == "sqlite" and file and not Path(file).exists():
            raise LedgerError(f"there is no ledger in {file} yet")
        with _translating():
            with self._engine.begin() as connection:
                _migrate(connection)

    def close(self) -> None:
        self._engine.dispose()

    def add(self, records: Sequence[UsageRecord]) -> None:
        """All or none, for good. Those whose id is there already change nothing."""
        if not records:
            return
        rows = [{**asdict(record), "outcome": record.outcome.value, "day": record.day} for record in records]
        with _translating(), self._engine.begin() as connection:
            connection.execute(self._insert(_USAGE).on_conflict_do_nothing(), rows)

    def summarise(
        self,
        by: Collection[GroupKey],
        *,
        since: float | None = None,
        until: float | None = None,
        team: str | None = None,
    ) -> list[UsageSum]:
        """Sums by these columns, in their order. since, until: seconds since the epoch, of the end of requests; what is
        kept by day counts if its day lies between them."""
        sums: dict[tuple[Any, ...], list[int]] = {}
        with _translating(), self._engine.connect() as connection:
            connection.execution_options(**{_READS: True})
            for statement in self._select_sums(by, since, until, team):
                for row in connection.execute(statement):
                    key, values = tuple(row[: len(by)]), row[len(by) :]
                    if not values[0]:  # the sum of nothing is NULL
                        continue
                    known = sums.setdefault(key, [0] * len(values))
                    sums[key] = [one + int(other) for one, other in zip(known, values, strict=True)]
        names = sorted(by, key=GROUP_KEYS.index)
        return [
            UsageSum(
                **{**dict.fromkeys(GROUP_KEYS), **dict(zip(names, key, strict=True))},
                **dict(zip(("num_requests", *SUMS), values, strict=True)),
            )
            for key, values in sorted(sums.items())
        ]

    def compact(self, before: float) -> int:
        """Add up by day what ended on days before that time (seconds since the epoch). Returns how many records went
        into these sums."""
        day = int(before // SECONDS_PER_DAY)
        old = _USAGE.c.day < day
        columns = [_USAGE.c[name] for name in ("team", "key_id", "model", "day")]
        grouped = sa.select(*columns, sa.func.count(), *(sa.func.sum(_USAGE.c[name]) for name in SUMS))
        added = self._insert(_DAYS).from_select(
            ["team", "key_id", "model", "day", "num_requests", *SUMS], grouped.where(old).group_by(*columns)
        )
        kept = {name: _DAYS.c[name] + added.excluded[name] for name in ("num_requests", *SUMS)}
        with _translating(), self._engine.begin() as connection:
            connection.execute(added.on_conflict_do_update(index_elements=list(_DAYS.primary_key), set_=kept))
            return connection.execute(sa.delete(_USAGE).where(old)).rowcount

    def _insert(self, table: sa.Table) -> Any:
        return (postgresql if self._engine.dialect.name == "postgresql" else sqlite).insert(table)

    def _select_sums(
        self, by: Collection[GroupKey], since: float | None, until: float | None, team: str | None
    ) -> list[sa.Select[Any]]:
        statements: list[sa.Select[Any]] = []
        for table, count in ((_USAGE, sa.func.count()), (_DAYS, sa.func.sum(_DAYS.c.num_requests))):
            columns = [table.c[name] for name in sorted(by, key=GROUP_KEYS.index)]
            statement = sa.select(*columns, count, *(sa.func.sum(table.c[name]) for name in SUMS))
            statement = statement.group_by(*columns)
            if team is not None:
                statement = statement.where(table.c.team == team)
            is_day = table is _DAYS
            end = table.c.day if is_day else table.c.ended_at
            if since is not None:
                statement = statement.where(end >= (-(-since // SECONDS_PER_DAY) if is_day else since))
            if until is not None:
                statement = statement.where(end < (until // SECONDS_PER_DAY if is_day else until))
            statements.append(statement)
        return statements


def _create_engine(url: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
            return sa.create_engine(parsed, pool_pre_ping=True, connect_args={"connect_timeout": _WAIT_S})
        if parsed.get_backend_name() == "sqlite":
            if parsed.database:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            engine = sa.create_engine(parsed, connect_args={"timeout": _WAIT_S})
            event.listen(engine, "connect", _set_up_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return engine
    except (ArgumentError, NoSuchModuleError, ImportError, OSError) as error:
        raise LedgerError(f"the ledger cannot be opened: {' '.join(str(error).split())}") from None
    raise LedgerError("the ledger's URL must begin with sqlite:/// or postgresql://")


def _set_up_sqlite(connection: Any, _: Any) -> None:
    """Transactions are begun by us, and are on the disk when they are committed."""
    connection.isolation_level = None
    for statement in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL"):
        connection.execute(statement)


def _begin_sqlite(connection: sa.Connection) -> None:
    """Whoever will write takes the lock at once: one that had read before could not wait for it any more."""
    reads = connection.get_execution_options().get(_READS, False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _migrate(connection: sa.Connection) -> None:
    """Raises LedgerError if a newer version of Shoal wrote it."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_POSTGRES_LOCK)))
    _VERSION.create(connection, checkfirst=True)
    version = connection.execute(sa.select(_VERSION.c.version)).scalar()
    if version is not None and version > len(MIGRATIONS):
        raise LedgerError(f"the ledger has schema {version}, this version of Shoal knows {len(MIGRATIONS)}: update it")
    for statement in itertools.chain.from_iterable(MIGRATIONS[version or 0 :]):
        connection.exec_driver_sql(statement)
    if version is None:
        connection.execute(sa.insert(_VERSION), {"version": len(MIGRATIONS)})
    else:
        connection.execute(sa.update(_VERSION), {"version": len(MIGRATIONS)})


@contextmanager
def _translating() -> Iterator[None]:
    """Errors of the database as LedgerError, in one line and without the URL, which has a password."""
    try:
        yield
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise LedgerError(f"the ledger's database failed: {' '.join(str(cause).split())[:300]}") from error


def get_costs(total: UsageSum, price_per_hour: float) -> Mapping[str, float]:
    """cost, and cost_per_million_tokens, at a price of an hour of one device. A device is one router or one replica of
    an expert group."""
    cost = (total.router_us + total.expert_us) / 3.6e9 * price_per_hour
    tokens = total.tokens_in + total.tokens_out
    return {"cost": cost, "cost_per_million_tokens": cost / tokens * 1e6 if tokens else 0.0}
