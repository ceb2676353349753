"""What can go wrong in a router.

RouterError
├── BadRequest            the client's fault: repeating it does not help      -> INVALID_ARGUMENT
│   └── GrammarFailed     what its answer must match cannot be compiled, or not be followed any further
├── QueueFull             more requests wait than allowed                     -> RESOURCE_EXHAUSTED
├── NotReady              loading or draining; another router may serve it    -> UNAVAILABLE
├── ExpertsUnavailable    no replica of a group came back in time             -> FAILED_PRECONDITION
├── StaleTable            an older expert table than the one in force         -> FAILED_PRECONDITION
├── FrameRefused          a replica calls a frame malformed: versions do not fit  -> INTERNAL
├── TableChanged          a frame no longer fits the expert table: plan again
└── ReplicaError          one replica failed one frame; another may take it
    ├── ConnectionLost    its stream broke, or could not be opened
    ├── CallTimeout       no reply within the deadline of the attempt
    ├── ReplicaRefused    it answered with a status other than OK
    ├── BadReply          it answered nonsense: its stream is ended
    └── ReplicaMismatch   it is not the replica that the expert table names

router/service.py translates to the gRPC statuses above; dispatch.py retries on ReplicaError.
"""


class RouterError(Exception):
    """Base of this package's errors."""


class BadRequest(RouterError):
    """A request that can never succeed as it stands."""


class GrammarFailed(BadRequest):
    """Says why, without repeating the grammar."""


class QueueFull(RouterError):
    """The bounded queue of waiting sequences is full."""


class NotReady(RouterError):
    """The router takes no request now: it is loading or draining."""


class ExpertsUnavailable(RouterError):
    """An expert group had no usable replica for expert_wait_s."""


class StaleTable(RouterError):
    """An expert table whose version is not newer than the one in force."""


class FrameRefused(RouterError):
    """A replica calls a frame malformed. Repeating it anywhere would give the same answer."""


class TableChanged(RouterError):
    """The expert table changed under a planned frame."""


class ReplicaError(RouterError):
    """One replica failed one frame. An expert call is pure, so it may be repeated elsewhere."""


class ConnectionLost(ReplicaError):
    """The stream to a replica broke."""


class CallTimeout(ReplicaError):
    """A replica did not answer within the attempt's deadline."""


class ReplicaRefused(ReplicaError):
    """A replica answered a frame with a status other than OK."""


class BadReply(ReplicaError):
    """A replica's answer is malformed, is for nothing that was asked, or holds what no sound replica computes."""


class ReplicaMismatch(ReplicaError):
    """Another incarnation, weight digest or model answers at a replica's address."""
