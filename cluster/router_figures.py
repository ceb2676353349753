"""The numbers of a router's Status as plain data, whatever they are: a figure that a router adds shows up by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_NUMBERS = frozenset(
    {
        FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT32,
        FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE,
    }
)  # fmt: skip


def read_figures(message: Message) -> dict[str, Any]:
    """Every number of a message by field name, zeros included; messages within it as dicts, lists as lists."""
    figures: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            figures[field.name] = {str(key): _read(item) for key, item in sorted(value.items())}
        elif field.message_type is not None or field.cpp_type in _NUMBERS:
            figures[field.name] = [_read(item) for item in value] if field.is_repeated else _read(value)
    return figures


def flatten(figures: Mapping[str, Any]) -> dict[str, float]:
    """Nested figures as one level, with dotted names; what is no number is left out."""
    flat: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, list):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat.update({f"{name}.{inner}": number for inner, number in flatten(value).items()})
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[name] = value
    return flat


def _read(value: Any) -> Any:
    return read_figures(value) if isinstance(value, Message) else value
