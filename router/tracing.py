"""Traces of sampled requests: OpenTelemetry spans from the client's traceparent down to each answer of an expert group.

https://www.w3.org/TR/trace-context/. Spans are made behind the work, with the times that were measured anyway; a
request that is not sampled costs a look at one attribute. The SDK is imported only where tracing is on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experts.errors import ConfigError

# Names of attributes follow OpenTelemetry's semantic conventions where these have any.
Attributes = Mapping[str, str | int | float]


class Span:
    """One that is sampled. Times: nanoseconds since the epoch."""

    def __init__(self, tracer: Tracer, span: Any) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def traceparent(self) -> str:
        """For whoever works on it next."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    def add_child(self, name: str, start_ns: int, attributes: Attributes | None = None) -> Span:
        """It goes on until end()."""
        return self._tracer.start_child(self._span, name, start_ns, attributes)

    def set(self, name: str, value: str | int | float) -> None:
        self._span.set_attribute(name, value)

    def end(self, end_ns: int | None = None, error: str | None = None) -> None:
        """end_ns: None: now."""
        if error is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, error)
        self._span.end(end_ns)


class Tracer:
    """Makes spans and sends them away in a thread of its own, some seconds later."""

    def __init__(self, service: str, target: str, share: float) -> None:
        """service: name of this process, as in `shoal-router`. target: URL of an OTLP/HTTP collector, or a file that
        gets a JSON line per span. share: of the requests without a traceparent that are sampled; the others go by what
        theirs says. Raises ConfigError."""
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        except ImportError as error:
            raise ConfigError(f"traces need opentelemetry-sdk: {error}") from error
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service}), sampler=ParentBased(TraceIdRatioBased(share))
        )
        self._provider.add_span_processor(BatchSpanProcessor(_make_exporter(target)))
        self._tracer = self._provider.get_tracer("shoal")

    def start(
        self, name: str, traceparent: str, start_ns: int | None = None, attributes: Attributes | None = None
    ) -> Span | None:
        """A span of the trace that traceparent names, or of a new one; None: it is not sampled."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({"traceparent": traceparent})
        span = self._tracer.start_span(name, context, start_time=start_ns, attributes=dict(attributes or {}))
        return Span(self, span) if span.is_recording() else None

    def start_child(self, parent: Any, name: str, start_ns: int, attributes: Attributes | None) -> Span:
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(parent)
        return Span(
            self, self._tracer.start_span(name, context, start_time=start_ns, attributes=dict(attributes or {}))
        )

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def is_sampled(traceparent: str) -> bool:
    """Whether a caller's trace context says that the request is sampled; malformed ones do not."""
    parts = traceparent.split("-")
    try:
        return len(parts) == 4 and len(parts[3]) == 2 and bool(int(parts[3], 16) & 1)
    except ValueError:
        return False


def to_wall_ns(monotonic_s: float) -> int:
    """A time of time.monotonic as nanoseconds since the epoch."""
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)


def _make_exporter(target: str) -> Any:
    if target.startswith(("http://", "https://")):
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise ConfigError(
                f"traces to a collector ({target}) need the extra `trace`: pip install 'shoal[trace]'"
            ) from error
        return OTLPSpanExporter(endpoint=target)
    return _make_file_exporter(Path(target))


def _make_file_exporter(path: Path) -> Any:
    """Raises ConfigError."""
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"traces cannot be written to {path}: {error.strerror}") from error

    class FileExporter(SpanExporter):
        """Several processes may append to one file: a line is one write."""

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            lines = "".join((span.to_json(indent=None) or "{}") + "\n" for span in spans)
            with path.open("a") as file:
                file.write(lines)
            return SpanExportResult.SUCCESS

    return FileExporter()
