"""The part of PromQL that the alert rules use, evaluated over pages of /metrics.

https://prometheus.io/docs/prometheus/latest/querying/basics/. Differences from Prometheus: rates are not extrapolated
to the ends of their range, and two vectors are matched by all their labels. What is not known raises ValueError.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from tests.metrics_text import Scrape

LOOKBACK_S = 300.0
Labels = tuple[tuple[str, str], ...]
Vector = dict[Labels, float]
Value = Vector | float

_TOKEN = re.compile(
    r"\s*(?P<text>\"(?:[^\"\\]|\\.)*\"|\[\d+[smh]\]|\d+(?:\.\d+)?|[a-zA-Z_:][a-zA-Z0-9_:]*|=~|!~|!=|==|<=|>=|[-+*/(){},=<>])"
)
_UNITS_S = {"s": 1, "m": 60, "h": 3600}
_AGGREGATES: Mapping[str, Callable[[Sequence[float]], float]] = {
    "sum": sum,
    "max": max,
    "min": min,
    "avg": lambda values: sum(values) / len(values),
}
_COMPARISONS = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge,
}  # fmt: skip
_ARITHMETIC: Mapping[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": lambda left, right: left / right if right else float("nan") if left == 0 else float("inf"),
}
_LEVELS = (("and",), tuple(_COMPARISONS), ("+", "-"), ("*", "/"))


class Page(NamedTuple):
    """What was scraped, when."""

    time_s: float
    scrape: Scrape


@dataclass
class History:
    """Pages in the order of their times."""

    pages: list[Page] = field(default_factory=list[Page])

    def add(self, time_s: float, scrape: Scrape) -> None:
        self.pages.append(Page(time_s, scrape))

    def series(self, name: str, matches: Callable[[Mapping[str, str]], bool], start_s: float, end_s: float
               ) -> dict[Labels, list[tuple[float, float]]]:  # fmt: skip
        found: defaultdict[Labels, list[tuple[float, float]]] = defaultdict(list)
        for time_s, scrape in self.pages:
            if not start_s < time_s <= end_s:
                continue
            for sample in scrape.samples:
                if sample.name == name and matches(sample.labels):
                    found[tuple(sorted(sample.labels.items()))].append((time_s, sample.value))
        return found


def evaluate(expression: str, history: History, now_s: float) -> Vector:
    """The instant vector that an expression gives. Raises ValueError for what is not known here."""
    parser = _Parser(_split(expression), history, now_s)
    value = parser.parse(0)
    parser.expect("")
    return value if isinstance(value, dict) else {(): value}


def is_firing(expression: str, for_s: float, history: History) -> bool:
    """Whether an alert fires at the last page: for some labels the expression has held at every page of the last
    for_s, and pages go back that far."""
    end_s = history.pages[-1].time_s
    times_s = [page.time_s for page in history.pages if page.time_s >= end_s - for_s]
    if end_s - times_s[0] < for_s:
        return False
    held = [set(evaluate(expression, history, time_s)) for time_s in times_s]
    return bool(set.intersection(*held))


def list_names(expression: str) -> set[str]:
    """The metrics of ours that an expression reads."""
    return {token for token in _split(expression) if token.startswith(("shoal_", "process_"))}


def _split(expression: str) -> Iterator[str]:
    at = 0
    while at < len(expression.rstrip()):
        match = _TOKEN.match(expression, at)
        if match is None:
            raise ValueError(f"cannot read {expression[at:]!r}")
        yield match["text"]
        at = match.end()


class _Parser:
    """Evaluates while it parses."""

    def __init__(self, tokens: Iterator[str], history: History, now_s: float) -> None:
        self._tokens = [*tokens, ""]
        self._at = 0
        self._history = history
        self._now_s = now_s

    def parse(self, level: int) -> Value:
        if level == len(_LEVELS):
            return self._parse_unit()
        left = self.parse(level + 1)
        while (operation := self._peek()) in _LEVELS[level]:
            self._take()
            left = _combine(operation, left, self.parse(level + 1))
        return left

    def expect(self, token: str) -> None:
        found = self._take()
        if found != token:
            raise ValueError(f"expected {token!r}, got {found!r}")

    def _peek(self) -> str:
        return self._tokens[self._at]

    def _take(self) -> str:
        self._at += 1
        return self._tokens[self._at - 1]

    def _parse_unit(self) -> Value:
        token = self._take()
        if token == "(":
            value = self.parse(0)
            self.expect(")")
            return value
        if token[:1].isdigit():
            return float(token)
        if token in _AGGREGATES:
            return self._parse_aggregate(token)
        if self._peek() == "(":
            return self._parse_call(token)
        name, matches = token, self._parse_matchers()
        series = self._history.series(name, matches, self._now_s - LOOKBACK_S, self._now_s)
        # A series that is missing from the newest page is gone.
        newest_s = max((page.time_s for page in self._history.pages if page.time_s <= self._now_s), default=0.0)
        return {labels: points[-1][1] for labels, points in series.items() if points[-1][0] == newest_s}

    def _parse_aggregate(self, name: str) -> Vector:
        by: set[str] = set()
        if self._peek() == "by":
            self._take()
            self.expect("(")
            while (token := self._take()) != ")":
                by |= {token} - {","}
        self.expect("(")
        vector = self.parse(0)
        self.expect(")")
        if not isinstance(vector, dict):
            raise ValueError(f"{name} of a number")
        grouped: defaultdict[Labels, list[float]] = defaultdict(list)
        for labels, value in vector.items():
            grouped[tuple((key, text) for key, text in labels if key in by)].append(value)
        return {labels: _AGGREGATES[name](values) for labels, values in grouped.items()}

    def _parse_call(self, name: str) -> Value:
        self.expect("(")
        match name:
            case "rate" | "increase":
                value: Value = self._parse_range(name)
            case "absent":
                value = {} if self.parse(0) else {(): 1.0}
            case "histogram_quantile":
                share = self.parse(0)
                self.expect(",")
                buckets = self.parse(0)
                assert isinstance(share, float) and isinstance(buckets, dict)
                value = _find_quantiles(share, buckets)
            case _:
                raise ValueError(f"unknown function {name}")
        self.expect(")")
        return value

    def _parse_range(self, function: str) -> Vector:
        name, matches = self._take(), self._parse_matchers()
        text = self._take()
        range_s = float(text[1:-2]) * _UNITS_S[text[-2]]
        found: Vector = {}
        for labels, points in self._history.series(name, matches, self._now_s - range_s, self._now_s).items():
            if len(points) < 2:
                continue
            grown = sum(after - before if after >= before else after for (_, before), (_, after) in pairwise(points))
            rate = grown / (points[-1][0] - points[0][0])
            found[labels] = rate if function == "rate" else rate * range_s
        return found

    def _parse_matchers(self) -> Callable[[Mapping[str, str]], bool]:
        matchers: list[tuple[str, str, str]] = []
        if self._peek() == "{":
            self._take()
            while (label := self._take()) != "}":
                if label != ",":
                    matchers.append((label, self._take(), self._take()[1:-1]))

        def matches(labels: Mapping[str, str]) -> bool:
            return all(_matches(labels.get(label, ""), operation, text) for label, operation, text in matchers)

        return matches


def _matches(value: str, operation: str, text: str) -> bool:
    match operation:
        case "=":
            return value == text
        case "!=":
            return value != text
        case "=~":
            return re.fullmatch(text, value) is not None
        case "!~":
            return re.fullmatch(text, value) is None
        case _:
            raise ValueError(f"unknown matcher {operation}")


def _combine(operation: str, left: Value, right: Value) -> Value:
    if operation == "and":
        assert isinstance(left, dict) and isinstance(right, dict)
        return {labels: value for labels, value in left.items() if labels in right}
    if isinstance(left, float) and isinstance(right, float):
        return _ARITHMETIC[operation](left, right)
    pairs: list[tuple[Labels, float, float]]
    if isinstance(left, dict) and isinstance(right, dict):
        pairs = [(labels, value, right[labels]) for labels, value in left.items() if labels in right]
    elif isinstance(left, dict):
        assert isinstance(right, float)
        pairs = [(labels, value, right) for labels, value in left.items()]
    else:
        assert isinstance(right, dict)
        pairs = [(labels, left, value) for labels, value in right.items()]
    if operation in _COMPARISONS:
        return {labels: first for labels, first, second in pairs if _COMPARISONS[operation](first, second)}
    return {labels: _ARITHMETIC[operation](first, second) for labels, first, second in pairs}


def _find_quantiles(share: float, buckets: Vector) -> Vector:
    grouped: defaultdict[Labels, list[tuple[float, float]]] = defaultdict(list)
    for labels, count in buckets.items():
        rest = tuple((key, value) for key, value in labels if key != "le")
        grouped[rest].append((float(dict(labels)["le"]), count))
    found: Vector = {}
    for labels, bounds in grouped.items():
        bounds.sort()
        wanted = share * bounds[-1][1]
        lower, below = 0.0, 0.0
        for bound, count in bounds:
            if count >= wanted and count > 0:
                is_last = bound == float("inf")
                found[labels] = (
                    lower if is_last else lower + (bound - lower) * (wanted - below) / max(count - below, 1e-9)
                )
                break
            lower, below = bound, count
    return found
