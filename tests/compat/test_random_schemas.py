"""Every complete answer to a JSON schema validates, whatever the schema and however bad the model."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

from tests.compat.conftest import MODEL
from tests.compat.random_schemas import make_schema
from tests.local_stack import LocalStack

# `make compat` takes 200.
NUM_SCHEMAS = int(os.environ.get("SHOAL_TEST_SCHEMAS", "12"))
TIMEOUT_S = 110.0
# Most answers of a small model come to their end by then; the rest shows nothing.
MAX_TOKENS = 500


@pytest.mark.timeout(600)
def test_complete_answers_validate(stack: LocalStack) -> None:
    """At temperature 1. Keywords for formats are compared with what jsonschema knows of them."""
    with stack.client(TIMEOUT_S) as client:

        def sample(seed: int) -> tuple[int, str, str]:
            schema = {"name": "s", "schema": make_schema(seed), "strict": True}
            body = {
                "model": MODEL,
                "messages": [{"role": "user", "content": "def"}],
                "response_format": {"type": "json_schema", "json_schema": schema},
                "temperature": 1,
                "seed": seed,
                "max_tokens": MAX_TOKENS,
            }
            answered = client.post("/v1/chat/completions", json=body)
            assert answered.status_code == 200, f"schema {seed}: {answered.text}"
            choice = answered.json()["choices"][0]
            return seed, choice["finish_reason"], choice["message"]["content"]

        with ThreadPoolExecutor(24) as threads:
            samples = list(threads.map(sample, range(NUM_SCHEMAS)))
    complete = [(seed, content) for seed, reason, content in samples if reason == "stop"]
    for seed, content in complete:
        validator = jsonschema.Draft202012Validator(
            make_schema(seed), format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        errors = [error.message for error in validator.iter_errors(json.loads(content))]
        assert errors == [], f"schema {seed}: {content!r}"
    assert len(complete) >= NUM_SCHEMAS * 0.5
