"""Logprobs and greedy tokens served over HTTP against transformers' own model on the same folder, both in float32.

The configs are those where the published maths and transformers agree. Where transformers 5 departs from it, a
config is chosen that cannot tell:
- V2 ignores norm_topk_prob there: false, as published.
- V3 divides by the sum of the weights even for a single chosen expert: more than one is chosen.
- q_a_layernorm and kv_a_layernorm ignore rms_norm_eps and use 1e-6: rms_norm_eps is 1e-6, as published.
- V3 masks gate groups with -inf, V2 with 0, which is the same for softmax scores.
- FP8 row counts that are no multiple of 128 are refused: it gets the dequantised twin of the folder.
- MTP layers are left out: it never runs them for plain generation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from router.v1 import router_pb2, router_pb2_grpc
from tests.local_stack import LocalStack, StackOptions, local_stack
from tests.random_checkpoint import write_random_checkpoint
from tests.reference.transformers_model import TransformersModel
from tests.tolerances import LOGPROB_OVER_HTTP_AGAINST_TRANSFORMERS

NUM_GREEDY_TOKENS = 64
REQUEST_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class ParityCase:
    """A checkpoint, how it is served, and how long the prompts are."""

    config: dict[str, Any]
    checkpoint_options: dict[str, Any] = field(default_factory=dict)
    num_groups: int = 2
    deterministic: bool | None = None
    router_arguments: tuple[str, ...] = ()
    prompt_lengths: tuple[int, ...] = (48, 17, 2)


CASES = {
    "v3-gate-groups": ParityCase({"n_group": 4, "topk_group": 2}, {"shards": 3}),
    "v3-one-gate-group": ParityCase(
        {
            "n_group": 1, "topk_group": 1, "n_routed_experts": 24, "num_experts_per_tok": 6,
            "routed_scaling_factor": 2.827,
        },
        {"shards": 1},
        num_groups=1,
    ),
    "v2-greedy-without-q-lora": ParityCase(
        {"model_type": "deepseek_v2", "q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 2},
        deterministic=True,
    ),
    "v2-group-limited-greedy": ParityCase(
        {
            "model_type": "deepseek_v2", "q_lora_rank": 32, "topk_method": "group_limited_greedy", "n_group": 4,
            "topk_group": 2, "routed_scaling_factor": 4.0,
        },
        num_groups=1,
    ),
    # Whole blocks everywhere but in kv_a_proj (144 rows), as in the published checkpoints; with an MTP layer.
    "v3-fp8-and-mtp-layer": ParityCase(
        {
            "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128,
            "kv_lora_rank": 128, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 32,
            "num_nextn_predict_layers": 1,
        },
        {"fp8": True, "shards": 4},
    ),
    # No size is a multiple of 128; scales are powers of two as in V3.1, stored as such; the MTP layer shares embedding
    # and head.
    "v3-fp8-partial-blocks-ue8m0": ParityCase(
        {
            "hidden_size": 200, "intermediate_size": 328, "moe_intermediate_size": 144, "q_lora_rank": 136,
            "kv_lora_rank": 40, "num_nextn_predict_layers": 1,
        },
        {"fp8": True, "ue8m0": True, "scale_dtype": torch.float8_e8m0fnu, "mtp_copies": False, "shards": 2},
        num_groups=1,
    ),
    # 600 tokens: beyond the original 128, beyond one chunk of the router's attention, and prefilled in three steps.
    "v3-yarn-beyond-original-length": ParityCase(
        {
            "qk_rope_head_dim": 16, "max_position_embeddings": 1280,
            "rope_scaling": {
                "type": "yarn", "factor": 10, "original_max_position_embeddings": 128, "beta_fast": 32,
                "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            },
        },
        router_arguments=("--max-batched-tokens", "256"),
        prompt_lengths=(600, 48),
    ),
}  # fmt: skip


@dataclass
class Served:
    """One running case: the stack, the judge, the prompts."""

    stack: LocalStack
    judge: TransformersModel
    prompts: list[list[int]]


@pytest.fixture(scope="module", params=list(CASES))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One stack per case; tests of a case share it."""
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    config = write_random_checkpoint(folder / "checkpoint", seed=11, **case.checkpoint_options, **case.config)
    generator = torch.Generator().manual_seed(29)
    prompts = [
        torch.randint(0, config["vocab_size"], (length,), generator=generator).tolist()
        for length in case.prompt_lengths
    ]
    options = StackOptions(
        num_groups=case.num_groups, deterministic=case.deterministic, extra_router_arguments=case.router_arguments
    )
    with local_stack(folder / "checkpoint", folder / "logs", options) as stack:
        yield Served(stack, TransformersModel(folder / "checkpoint", folder / "twin"), prompts)


def test_prompt_logprobs_over_http(served: Served) -> None:
    """Every prompt in one request; the alternatives must be the judge's best tokens too."""
    body = complete(served, max_tokens=0, echo=True, logprobs=5)

    assert [choice["index"] for choice in body["choices"]] == list(range(len(served.prompts)))
    for prompt, choice in zip(served.prompts, body["choices"], strict=True):
        expected = served.judge.compute_logprobs(prompt)
        token_logprobs = choice["logprobs"]["token_logprobs"]
        assert len(token_logprobs) == len(prompt)
        assert token_logprobs[0] is None
        own = expected[:-1].gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
        assert_close(token_logprobs[1:], own, f"prompt of {len(prompt)}")
        for position, alternatives in enumerate(choice["logprobs"]["top_logprobs"][1:]):
            best = expected[position].topk(5).values
            # Ids that decode to the same text share an entry, and the prompt's own token may be a sixth.
            assert max(alternatives.values()) == pytest.approx(
                float(best[0]), abs=LOGPROB_OVER_HTTP_AGAINST_TRANSFORMERS
            )


def test_greedy_tokens_are_identical(served: Served) -> None:
    """64 tokens, their ids as the router sends them and their text and logprobs as HTTP does."""
    body = complete(served, max_tokens=NUM_GREEDY_TOKENS, echo=False, logprobs=1)

    for prompt, choice in zip(served.prompts, body["choices"], strict=True):
        expected_ids = served.judge.generate_greedy(prompt, NUM_GREEDY_TOKENS)
        assert generate_ids(served.stack, prompt) == expected_ids
        logprobs = served.judge.compute_logprobs(prompt + expected_ids)
        own = logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(expected_ids).unsqueeze(1)).squeeze(1)
        assert_close(choice["logprobs"]["token_logprobs"], own, f"answer to a prompt of {len(prompt)}")
        assert choice["finish_reason"] == "length"


def complete(served: Served, **fields: Any) -> dict[str, Any]:
    with served.stack.client(REQUEST_TIMEOUT_S) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        response = client.post(
            "/v1/completions",
            json={"model": model, "prompt": served.prompts, "temperature": 0, "ignore_eos": True, **fields},
        )
    assert response.status_code == 200, f"{response.text}\n{served.stack.describe_failure()}"
    return response.json()


def generate_ids(stack: LocalStack, prompt: list[int]) -> list[int]:
    request = router_pb2.GenerateRequest(
        request_id="parity",
        prompt_token_ids=prompt,
        sampling=router_pb2.SamplingParams(temperature=0.0, top_p=1.0),
        max_tokens=NUM_GREEDY_TOKENS,
        ignore_eos=True,
    )
    with stack.router_channel() as channel:
        responses = router_pb2_grpc.RouterServiceStub(channel).Generate(request, timeout=REQUEST_TIMEOUT_S)
        return [token.token_id for response in responses for token in response.tokens]


def assert_close(found: list[float], expected: torch.Tensor, what: str) -> None:
    assert len(found) == expected.numel()
    assert all(value is not None and math.isfinite(value) for value in found)
    difference = (torch.tensor(found) - expected).abs()
    worst = int(difference.argmax())
    assert float(difference[worst]) <= LOGPROB_OVER_HTTP_AGAINST_TRANSFORMERS, (
        f"{what}: token {worst} served {found[worst]:.6f}, transformers {float(expected[worst]):.6f}"
    )
