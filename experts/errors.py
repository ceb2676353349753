"""What can go wrong in the experts package, as one tree.

ExpertsError
├── ConfigError        config.json is missing, malformed, or describes a model this program does not serve
├── CheckpointError    a file of the checkpoint folder is missing, damaged or contradicts the config
├── NotEnoughMemory    the weights will not fit into the memory that is left
├── BadFrame           bytes from the network that are no valid frame
├── NotHosted          a frame asks for a (layer, expert) pair that this replica does not hold
├── StaleIncarnation   a frame is addressed to an earlier start of this replica
├── Overloaded         a frame was shed: its deadline passed in the queue, or memory ran out
└── Draining           this replica takes no more frames

Every message is one line. The edges translate: experts/server.py to a ComputeStatus, the command line
programs to one line on stderr and exit code 1.
"""

from __future__ import annotations


class ExpertsError(Exception):
    """Root of everything this package raises on purpose."""


class ConfigError(ExpertsError):
    """The model configuration cannot be served; the message names the field, the value and what is supported."""


class CheckpointError(ExpertsError):
    """A checkpoint file is missing, damaged or contradicts the config.

    reason: what was expected and what was found. file: name within the folder, or None when no single file is
    to blame. tensor: name, or None when the whole file is meant. remedy: what the user can do.
    """

    def __init__(self, reason: str, *, remedy: str, file: str | None = None, tensor: str | None = None) -> None:
        self.reason = reason
        self.remedy = remedy
        self.file = file
        self.tensor = tensor
        places = [place for place in (file, f"tensor {tensor}" if tensor is not None else None) if place is not None]
        super().__init__(": ".join([*places, f"{reason} ({remedy})"]))


class NotEnoughMemory(ExpertsError):
    """The weights will not fit; said before anything is loaded."""


class BadFrame(ExpertsError):
    """Bytes from the network contradict the contract of experts.proto.

    frame_id: the frame's number where the header could be read, so that it can be answered; else None.
    """

    def __init__(self, message: str, *, frame_id: int | None = None) -> None:
        self.frame_id = frame_id
        super().__init__(message)


class NotHosted(ExpertsError):
    """A (layer, expert) pair is not hosted here: the router must plan the frame again."""


class StaleIncarnation(ExpertsError):
    """The frame names another incarnation: the router must read the expert table again."""


class Overloaded(ExpertsError):
    """The frame was shed; another replica may take it."""


class Draining(ExpertsError):
    """This replica is leaving and takes no more frames."""
