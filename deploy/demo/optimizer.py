"""Master weights in float32, their updates, and the bf16 (or FP8-rounded) copies the model computes with.

Matrices go by Muon (orthogonalised momentum; learns more per token than Adam at this size), everything else by AdamW.
It knows parameters by name and shape, nothing of data or time.
"""

from collections import defaultdict

import torch
from export import dequantize, is_fp8, quantize
from torch import Tensor, nn

# Quintic Newton-Schulz coefficients of the Muon optimizer (Jordan et al., 2024): fast rather than exact.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ADAM_LEARNING_RATE = {"model.embed_tokens.weight": 6e-3, "lm_head.weight": 3e-3, "mlp.gate.weight": 5e-4}
ADAM_LEARNING_RATE_NORMS = 5e-3
MUON_LEARNING_RATE = 0.02
MUON_MOMENTUM = 0.95
WEIGHT_DECAY = 0.1  # of matrices, times the learning rate


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly. matrices: [num, out, in]; returns the same shape in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Optimizer:
    """Owns the masters. `step_` reads the model's gradients; `publish_` overwrites the model's weights."""

    def __init__(self, model: nn.Module):
        self.parameters = dict(model.named_parameters())
        self.masters = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        adam_groups = []
        self.momentum: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            known = [rate for suffix, rate in ADAM_LEARNING_RATE.items() if name.endswith(suffix)]
            if known or master.dim() == 1:
                rate = known[0] if known else ADAM_LEARNING_RATE_NORMS
                adam_groups.append({"params": [master], "lr": rate, "full_lr": rate})
            else:
                self.momentum[name] = torch.zeros_like(master)
        self.adam = torch.optim.AdamW(adam_groups, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
        self.by_shape: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name, master in self.masters.items():
            if name in self.momentum:
                self.by_shape[master.shape[-2], master.shape[-1]].append(name)

    @torch.no_grad()
    def step_(self, rate: float) -> None:
        """Apply and clear the gradients. rate: share of the full learning rates, 0 to 1."""
        for group in self.adam.param_groups:
            group["lr"] = group["full_lr"] * rate
        for name, master in self.masters.items():
            if name not in self.momentum:
                master.grad = self.parameters[name].grad.float()
        self.adam.step()
        for (out, width), names in self.by_shape.items():
            updates = []
            for name in names:
                gradient = self.parameters[name].grad.float()
                momentum = self.momentum[name].lerp_(gradient, 1 - MUON_MOMENTUM)
                updates.append(gradient.lerp(momentum, MUON_MOMENTUM).reshape(-1, out, width).to(torch.bfloat16))
            counts = [len(update) for update in updates]
            scale = MUON_LEARNING_RATE * rate * max(1.0, out / width) ** 0.5
            for name, update in zip(names, orthogonalize(torch.cat(updates)).split(counts), strict=True):
                master = self.masters[name]
                master.mul_(1 - MUON_LEARNING_RATE * rate * WEIGHT_DECAY)
                master.sub_(update.view_as(master).float(), alpha=scale)
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def publish_(self, round_to_fp8: bool) -> None:
        """Copy the masters to the model. round_to_fp8: with the rounding of the export, so that training meets it;
        the gradient then passes straight through to the masters."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if round_to_fp8 and is_fp8(name, master):
                master = dequantize(*quantize(master))
            parameter.copy_(master)

    def state(self) -> dict:
        return {"masters": self.masters, "momentum": self.momentum, "adam": self.adam.state_dict()}

    def load_state_(self, state: dict) -> None:
        for name, master in self.masters.items():
            master.copy_(state["masters"][name])
        for name, momentum in self.momentum.items():
            momentum.copy_(state["momentum"][name])
        self.adam.load_state_dict(state["adam"])
