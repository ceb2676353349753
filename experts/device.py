"""Which device a process computes on: the CPU or one CUDA card, chosen once when it starts.

Every process chooses for itself, so machines and cards may be mixed; two different cards differ in their numerics_id.
Under Ray a process sees the cards that it was given, and its first one is cuda:0.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from experts.errors import ConfigError
from experts.kernels.tile_table import FIRST_CAPABILITY, Capability
from experts.memory import check_memory, refuse_too_little

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class CudaCard:
    """A card as torch sees it in this process. index: of "cuda:INDEX"."""

    index: int
    name: str
    capability: Capability

    @property
    def is_served(self) -> bool:
        """Whether it is recent enough for the kernels."""
        return self.capability >= FIRST_CAPABILITY


def resolve_device(setting: str) -> torch.device:
    """Turn "auto", "cpu", "cuda" or "cuda:INDEX" into a device of this process; says in the log which and why.

    Raises ConfigError if that card is not there or cannot be served.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    cards = list_cards() if setting != "cpu" else []
    device = choose_device(setting, cards, has_triton=has_triton)
    logger.info(
        "device=%s setting=%s cards=%s",
        device,
        setting,
        "; ".join(f"{card.name} ({_dotted(card.capability)})" for card in cards) or "none",
    )
    return device


def choose_device(setting: str, cards: Sequence[CudaCard], *, has_triton: bool) -> torch.device:
    """See resolve_device. "auto" takes the first card that can be served, and the CPU where there is none.

    has_triton: whether the package is installed, without which no card is served.
    """
    kind, _, index_text = setting.partition(":")
    if setting not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index_text.isdecimal()):
        raise ConfigError(f"device {setting!r}: expected auto, cpu, cuda or cuda:INDEX")
    if setting == "auto":
        served = [card for card in cards if card.is_served] if has_triton else []
        return torch.device("cuda", served[0].index) if served else CPU
    if setting == "cpu":
        return CPU
    if not cards:
        raise ConfigError(
            f"device {setting}: torch sees no CUDA card here "
            "(check the driver, CUDA_VISIBLE_DEVICES and that torch was built for CUDA, or use --device cpu)"
        )
    index = int(index_text) if index_text else 0
    if index >= len(cards):
        raise ConfigError(f"device {setting}: this process sees cuda:0 to cuda:{len(cards) - 1}")
    card = cards[index]
    if not card.is_served:
        raise ConfigError(
            f"device {setting}: {card.name} has compute capability {_dotted(card.capability)}, at least "
            f"{_dotted(FIRST_CAPABILITY)} (Ampere) is needed (use --device cpu)"
        )
    if not has_triton:
        raise ConfigError(f"device {setting}: the kernels need the package triton (install shoal[gpu])")
    return torch.device("cuda", index)


def list_cards() -> list[CudaCard]:
    """The cards that this process may use, in torch's order."""
    if not torch.cuda.is_available():
        return []
    return [
        CudaCard(index, torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
        for index in range(torch.cuda.device_count())
    ]


def check_device_memory(
    device: torch.device, needed_bytes: int, what: str, remedy: str, *, free_bytes: int | None = None
) -> None:
    """Raise NotEnoughMemory, with both numbers, if needed_bytes will not fit where the device computes.

    free_bytes: of the card; None asks it. What this machine has left is asked in any case if the device is the CPU.
    """
    if device.type == "cpu":
        check_memory(needed_bytes, what, remedy)
        return
    if free_bytes is None:
        free_bytes = torch.cuda.mem_get_info(device)[0]
    refuse_too_little(needed_bytes, free_bytes, what, remedy, place=f" on {device}")


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
