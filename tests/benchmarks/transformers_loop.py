"""transformers' DeepseekV3ForCausalLM in bf16 by its fastest way on a CPU: a bare forward loop with a KV cache.

Not a benchmark itself. `experts_implementation="grouped_mm"` and sdpa; none of generate()'s work per token. The weights
are dequantised straight into the model, so no second checkpoint is written.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from tests.benchmarks.generated_checkpoint import read_dequantized

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class TransformersLoop:
    """The model on num_threads threads. Prompts are rows of token ids of equal length."""

    def __init__(self, folder: Path, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        # Any: transformers' own classes are typed too loosely for what is done to them here.
        config: Any = AutoConfig.from_pretrained(folder)
        del config.quantization_config
        with torch.device("meta"):
            self._model: Any = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm"
            )
        self._model.eval().to_empty(device="cpu")
        self._model.model.rotary_emb = DeepseekV3RotaryEmbedding(config)
        for layer in self._model.model.layers[config.first_k_dense_replace :]:
            # Kept in float32 by from_pretrained too.
            gate = layer.mlp.gate
            gate.e_score_correction_bias = torch.nn.Buffer(gate.e_score_correction_bias.float())
        with torch.no_grad():
            self._load(folder)

    @property
    def version(self) -> str:
        return transformers.__version__

    @torch.inference_mode()
    def decode_s(self, prompts: list[list[int]], num_steps: int) -> list[float]:
        """Seconds of each of num_steps greedy steps of all sequences together, after the prompts."""
        cache = DynamicCache(config=self._model.config)
        output = self._model(torch.tensor(prompts), past_key_values=cache, use_cache=True, logits_to_keep=1)
        taken_s: list[float] = []
        for _ in range(num_steps):
            started_s = time.perf_counter()
            token_ids = output.logits[:, -1].argmax(-1, keepdim=True)
            output = self._model(token_ids, past_key_values=cache, use_cache=True)
            taken_s.append(time.perf_counter() - started_s)
        return taken_s

    @torch.inference_mode()
    def prefill_s(self, prompt: list[int]) -> float:
        """Seconds from the prompt to its first token."""
        started_s = time.perf_counter()
        cache = DynamicCache(config=self._model.config)
        self._model(torch.tensor([prompt]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        return time.perf_counter() - started_s

    @torch.inference_mode()
    def prompt_logprobs(self, prompt: list[int]) -> list[float]:
        """Of every token but the first."""
        logprobs = self._model(torch.tensor([prompt]), use_cache=False).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()

    def _load(self, folder: Path) -> None:
        """Copy every tensor of the checkpoint into place. Raises ValueError if any place was left out."""
        targets = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        inner: int = self._model.config.moe_intermediate_size
        # Three matrices of every expert share two targets.
        missing = {name: 1 for name in targets if "rotary_emb" not in name}
        for name in missing:
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                missing[name] = self._model.config.n_routed_experts * (2 if name.endswith("gate_up_proj") else 1)
        for name, weight in read_dequantized(folder):
            if match := _EXPERT.fullmatch(name):
                prefix, expert_id, kind = match.groups()
                name = f"{prefix}.{'down' if kind == 'down' else 'gate_up'}_proj"
                target = targets[name][int(expert_id)]
                if kind != "down":
                    target = target[:inner] if kind == "gate" else target[inner:]
            else:
                target = targets[name]
            target.copy_(weight)
            missing[name] -= 1
        if left := [name for name, count in missing.items() if count]:
            raise ValueError(f"{folder} has no tensors for {left[:5]}")
