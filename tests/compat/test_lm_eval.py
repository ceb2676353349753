"""lm-eval's local-completions against the served demo: the log-likelihood path. Needs the `compat` extra."""

from __future__ import annotations

from typing import Any

import pytest

from tests.compat.conftest import DEMO, MODEL
from tests.local_stack import LocalStack

_REASON = "needs the compat extra: make compat"
completions = pytest.importorskip("lm_eval.models.openai_completions", reason=_REASON)
instances = pytest.importorskip("lm_eval.api.instance", reason=_REASON)

CASES = [("def is_empty(self):\n    return", " True"), ("import", " os"), ("for i in range(", "10):\n    pass")]


def make_model(stack: LocalStack, tokenizer: str) -> Any:
    options: dict[str, Any] = {"tokenizer_backend": "huggingface", "tokenizer": str(DEMO)}
    if tokenizer == "remote":
        options = {"tokenizer_backend": "remote"}
    return completions.LocalCompletionsAPI(
        base_url=f"{stack.base_url}/v1/completions", model=MODEL, max_length=512, **options
    )


def measure(model: Any) -> list[tuple[float, bool]]:
    requests = [
        instances.Instance(request_type="loglikelihood", doc={}, arguments=case, idx=index)
        for index, case in enumerate(CASES)
    ]
    return model.loglikelihood(requests, disable_tqdm=True)


@pytest.mark.parametrize("tokenizer", ["huggingface", "remote"])
def test_log_likelihoods_are_those_of_the_text(stack: LocalStack, tokenizer: str) -> None:
    found = measure(make_model(stack, tokenizer))
    with stack.client() as client:
        for (context, continuation), (logprob, is_greedy) in zip(CASES, found, strict=True):
            body = {"prompt": context + continuation, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0,
                    "add_special_tokens": False}  # fmt: skip
            logprobs = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
            num_context = sum(offset < len(context) for offset in logprobs["text_offset"])
            own = logprobs["token_logprobs"][num_context:-1]
            best = [max(top.values()) for top in logprobs["top_logprobs"][num_context:-1]]
            assert logprob == pytest.approx(sum(own), abs=0.05)
            assert is_greedy == (own == best)
