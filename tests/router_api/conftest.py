"""A tiny checkpoint folder without weights, a scripted router, and the app in front of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from router.api.router_client import StaticEndpoints
from router.api.settings import ApiSettings
from router.api.tokenizer import TextTokenizer
from router.api.tool_formats import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR
from tests.router_api.api_server import ApiServer
from tests.router_api.scripted_router import ScriptedRouter

MODEL = "tiny"
MAX_MODEL_LEN = 512
CALLS = (CALLS_BEGIN, CALL_BEGIN, SEPARATOR, CALL_END, CALLS_END)
BOS, EOS, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"

_CORPUS = [
    "def add(self, value):\n    return self.total + value\n",
    "class Counter:\n    def __init__(self):\n        self.count = 0\n",
    "hello world, the quick brown fox jumps over the lazy dog\n",
] * 20

_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}{% set content = message['content'] or '' %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|assistant|>' + content + eos_token }}"
    "{% else %}{{ raise_exception('tools are unknown to this model') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 400, "hidden_size": 32,
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "intermediate_size": 32, "moe_intermediate_size": 16,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 1.0,
    "num_attention_heads": 2, "q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 10000, "max_position_embeddings": MAX_MODEL_LEN,
    "num_nextn_predict_layers": 0, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def write_checkpoint(folder: Path) -> Path:
    """config.json and tokenizer files, as transformers would save them."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=390,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[BOS, EOS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    # As published: role and reasoning markers are added tokens, but not special ones.
    tokenizer.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in (USER, ASSISTANT, "<think>", "</think>", *CALLS)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {"bos_token": BOS, "eos_token": {"content": EOS}, "chat_template": _TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / MODEL)


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> TextTokenizer:
    return TextTokenizer(checkpoint)


@pytest.fixture(scope="session")
def settings(checkpoint: Path) -> ApiSettings:
    return ApiSettings(
        checkpoint=checkpoint,
        router_wait_s=1.0,
        body_timeout_s=1.0,
        status_timeout_s=0.5,
        max_body_bytes=64 * 1024,
        max_sequences=16,
    )


@pytest.fixture(scope="session")
def shared_router() -> Iterator[ScriptedRouter]:
    router = ScriptedRouter()
    yield router
    router.stop()


@pytest.fixture(scope="session")
def api(settings: ApiSettings, shared_router: ScriptedRouter) -> Iterator[ApiServer]:
    server = ApiServer(settings, StaticEndpoints([shared_router.endpoint]))
    yield server
    server.stop()


@pytest.fixture
def router(shared_router: ScriptedRouter) -> ScriptedRouter:
    """The router behind `api`, as new."""
    shared_router.reset()
    return shared_router


# One client each for all tests: making one loads certificates for a good part of a test's time.
@pytest.fixture(scope="session")
def http(api: ApiServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=api.url, timeout=10.0) as client:
        yield client


@pytest.fixture(scope="session")
def client(api: ApiServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", timeout=10.0, max_retries=0) as client:
        yield client


@pytest.fixture
def api_url(api: ApiServer) -> str:
    return api.url
