"""One expert group: weights, what they can be asked for, and the computation of one frame.

It knows nothing of sockets, deadlines or other groups. An expert call is pure: the same frame gives the same
result, whoever repeats it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch

from experts.errors import BadFrame, NotHosted, Overloaded
from experts.expert_range import ExpertRange
from experts.frame_transfer import PendingResult, make_frame_transfer
from experts.kernels.expert_kernel import NativeKernel
from experts.model_config import ModelConfig
from experts.native_serving import FrameFunction, make_frame_function
from experts.weights import ExpertWeights
from experts.wire import MAX_MESSAGE_BYTES, ComputeFrame, WireFormat, compute_max_rows, compute_row_bytes

logger = logging.getLogger(__name__)


class ExpertGroup:
    """Computes frames with the experts it owns. Not thread-safe for speed: callers take turns; use() by any thread."""

    def __init__(self, weights: ExpertWeights, *, end_process: Callable[[], object] = lambda: os._exit(1)) -> None:
        """end_process: called when the card has failed, after which nothing can be computed in this process."""
        self._hosting = _Hosting(weights)
        self._end_process = end_process
        self.numerics_id = weights.kernel.numerics_id
        self._transfer = make_frame_transfer(weights.kernel.device)

    @property
    def _weights(self) -> ExpertWeights:
        return self._hosting.weights

    def use(self, weights: ExpertWeights) -> None:
        """Go on with other experts of the same checkpoint and kernel; frames being computed end with those before."""
        self._hosting = _Hosting(weights)

    @property
    def weights(self) -> ExpertWeights:
        return self._weights

    @property
    def config(self) -> ModelConfig:
        return self._weights.config

    @property
    def hosted(self) -> Sequence[ExpertRange]:
        return self._weights.hosted

    @property
    def hidden_size(self) -> int:
        return self._weights.config.hidden_size

    @property
    def weight_digest(self) -> str:
        return self._weights.digest

    @property
    def max_rows(self) -> int:
        """Most rows of one frame, in the widest wire dtype and reduced; frames for exact results hold fewer."""
        config = self._weights.config
        return compute_max_rows(config.hidden_size, config.num_experts_per_tok, WireFormat.FLOAT32, exact=False)

    @property
    def frame_function(self) -> FrameFunction | None:
        """What check_frame and compute do for a frame in the dtype of the weights, as a C function, if there is one."""
        weights = self._weights
        if not isinstance(weights.kernel, NativeKernel):
            return None
        return make_frame_function(weights.kernel.kernel, weights.layers, weights.dtype, weights.config)

    def check_frame(self, frame: ComputeFrame) -> None:
        """Raise NotHosted for a pair that is not ours and BadFrame for sizes that are not the model's."""
        self._check_frame(frame, self._hosting)

    def _check_frame(self, frame: ComputeFrame, hosting: _Hosting) -> None:
        hidden_size = frame.hidden_states.shape[1]
        if hidden_size != self.hidden_size:
            raise BadFrame(f"hidden size: expected {self.hidden_size}, got {hidden_size}", frame_id=frame.frame_id)
        result_bytes = frame.num_result_rows * compute_row_bytes(hidden_size, frame.reply_dtype)
        if result_bytes > MAX_MESSAGE_BYTES - 1024:
            raise BadFrame(
                f"the answer would take {result_bytes} bytes, more than one message holds: send fewer rows",
                frame_id=frame.frame_id,
            )
        marked = hosting.marked.get(frame.layer_id)
        if marked is None:
            raise NotHosted(f"layer {frame.layer_id} is not hosted here")
        if frame.pair_experts.max() >= len(marked) or not marked[frame.pair_experts].all():
            wanted = np.unique(frame.pair_experts)
            missing = [int(expert) for expert in wanted if expert >= len(marked) or not marked[expert]]
            raise NotHosted(f"layer {frame.layer_id}: experts {missing[:8]} are not hosted here")

    def compute(self, frame: ComputeFrame) -> torch.Tensor:
        """Compute a frame. Returns [num_result_rows, hidden_size], rounded once to the dtype that the answer is wanted
        in; float32 if that is FP8, for the encoder to quantise.

        Raises what begin raises.
        """
        try:
            return self.begin(frame).wait()
        except torch.AcceleratorError:
            # Whatever is asked of a card after that fails too. A process that listens and answers nobody would look
            # alive; a fresh one may find the card well, or says that it is gone.
            logger.critical("the card failed; ending the process", exc_info=True)
            self._end_process()
            raise

    @torch.inference_mode()
    def begin(self, frame: ComputeFrame) -> PendingResult:
        """Start computing a frame; on a card this returns while it computes, so that the next frame can be sent.

        Raises NotHosted or BadFrame, see check_frame, and Overloaded if the device's memory does not suffice now.
        """
        hosting = self._hosting
        self._check_frame(frame, hosting)
        weights = hosting.weights
        reply_dtype = torch.float32 if frame.reply_dtype == torch.float8_e4m3fn else frame.reply_dtype
        try:
            with self._transfer.computing():
                hidden_states = self._transfer.send(frame, weights.dtype)
                result = weights.kernel.expert_ffn(
                    hidden_states,
                    frame.pair_rows,
                    frame.pair_experts,
                    frame.pair_weights,
                    weights.layers[frame.layer_id],
                    exact=frame.exact,
                )
                return self._transfer.fetch(result, reply_dtype)
        except torch.OutOfMemoryError as error:
            raise Overloaded(f"no memory for a frame of {frame.hidden_states.shape[0]} rows on the device") from error


class _Hosting:
    """Weights, and for each layer bool [n_routed_experts]: whether an expert is hosted. Never changed."""

    def __init__(self, weights: ExpertWeights) -> None:
        self.weights = weights
        self.marked = {
            layer_id: _mark_hosted(weights.config.n_routed_experts, tuple(experts))
            for layer_id, experts in weights.layers.items()
        }


def _mark_hosted(n_routed_experts: int, experts: Sequence[int]) -> np.ndarray:
    """bool [n_routed_experts]: whether an expert is hosted."""
    marked = np.zeros(n_routed_experts, dtype=bool)
    marked[list(experts)] = True
    return marked
