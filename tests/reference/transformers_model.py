"""transformers' own DeepseekV2/V3ForCausalLM as the judge, in float32 on one checkpoint folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.random_checkpoint import dequantized_twin


class TransformersModel:
    """The dequantised twin of a checkpoint, loaded by transformers.

    Always the twin: transformers refuses FP8 tensors whose rows are no multiple of 128 (kv_a_proj's 576 in the
    published checkpoints), and for a bf16 folder the float32 twin holds the same values.
    """

    def __init__(self, checkpoint: Path, twin: Path) -> None:
        dequantized_twin(checkpoint, twin)
        transformers.utils.logging.disable_progress_bar()
        # Any: transformers' own protocol for generate() does not fit its own model classes.
        self._model: Any = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32, attn_implementation="eager")
        self._model.eval()
        # generate() would fill a missing eos_token_id from here and stop early.
        self._model.generation_config.eos_token_id = None

    @property
    def class_name(self) -> str:
        return type(self._model).__name__

    @torch.no_grad()
    def compute_logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[len(token_ids), vocab_size] float32: row i is the distribution of token i + 1."""
        logits = self._model(torch.tensor([list(token_ids)]), use_cache=False).logits
        return logits[0].float().log_softmax(dim=-1)

    @torch.no_grad()
    def generate_greedy(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """num_tokens most probable tokens by transformers' own loop, end-of-sequence ids included as tokens."""
        output = self._model.generate(
            torch.tensor([list(token_ids)]),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
            generation_config=transformers.GenerationConfig(max_new_tokens=num_tokens, do_sample=False, pad_token_id=0),
        )
        return output[0, len(token_ids) :].tolist()
