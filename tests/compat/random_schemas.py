"""Random JSON schemas, of the keywords that are enforced. From a seed, so that each can be had again."""

from __future__ import annotations

import random
from typing import Any


def make_schema(seed: int) -> dict[str, Any]:
    random_ = random.Random(seed)
    return _make_object(random_, depth=0)


def _make(random_: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_make_string, _make_integer, _make_number, _make_enum, _make_boolean, _make_pattern, _make_format]
    if depth < 3:
        kinds += [_make_object, _make_array, _make_choice]
    return random_.choice(kinds)(random_, depth)


def _make_object(random_: random.Random, depth: int) -> dict[str, Any]:
    names = random_.sample(["id", "name", "size", "tags", "größe", "a b", 'q"', "parent"], random_.randint(1, 4))
    properties = {name: _make(random_, depth + 1) for name in names}
    required = random_.sample(names, random_.randint(0, len(names)))
    schema: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
    schema["additionalProperties"] = random_.choice([False, False, {"type": "boolean"}])
    return schema


def _make_array(random_: random.Random, depth: int) -> dict[str, Any]:
    low = random_.randint(0, 2)
    return {
        "type": "array",
        "items": _make(random_, depth + 1),
        "minItems": low,
        "maxItems": low + random_.randint(0, 2),
    }


def _make_choice(random_: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_make(random_, depth + 1) for _ in range(random_.randint(2, 3))]}


def _make_string(random_: random.Random, depth: int) -> dict[str, Any]:
    del depth
    low = random_.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + random_.randint(0, 8)}


def _make_integer(random_: random.Random, depth: int) -> dict[str, Any]:
    del depth
    low = random_.randint(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + random_.randint(0, 500)}


def _make_number(random_: random.Random, depth: int) -> dict[str, Any]:
    del depth
    return {"type": "number", "exclusiveMinimum": 0, "maximum": random_.choice([1, 2.5, 1000])}


def _make_enum(random_: random.Random, depth: int) -> dict[str, Any]:
    del depth
    return {"enum": random_.sample(["red", "é\n", 3, -1.5, None, True, "x y"], random_.randint(1, 4))}


def _make_boolean(random_: random.Random, depth: int) -> dict[str, Any]:
    del depth
    return random_.choice([{"type": "boolean"}, {"type": ["boolean", "null"]}, {"const": "yes"}])


def _make_pattern(random_: random.Random, depth: int) -> dict[str, Any]:
    del depth
    return {
        "type": "string",
        "pattern": random_.choice(["^[a-z]{2,5}$", "^(ab|cd)+$", "^[0-9]{3}-[0-9]{2}$"]),
        "maxLength": 8,
    }


def _make_format(random_: random.Random, depth: int) -> dict[str, Any]:
    del depth
    return {"type": "string", "format": random_.choice(["date", "time", "date-time", "uuid", "ipv4"])}
