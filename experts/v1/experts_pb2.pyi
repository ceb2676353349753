from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TensorDtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TENSOR_DTYPE_UNSPECIFIED: _ClassVar[TensorDtype]
    TENSOR_DTYPE_BFLOAT16: _ClassVar[TensorDtype]
    TENSOR_DTYPE_FLOAT32: _ClassVar[TensorDtype]
    TENSOR_DTYPE_FP8_E4M3_BLOCK128: _ClassVar[TensorDtype]

class CombineMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMBINE_MODE_UNSPECIFIED: _ClassVar[CombineMode]
    COMBINE_MODE_REDUCED: _ClassVar[CombineMode]
    COMBINE_MODE_EXACT: _ClassVar[CombineMode]

class ComputeStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPUTE_STATUS_UNSPECIFIED: _ClassVar[ComputeStatus]
    COMPUTE_STATUS_OK: _ClassVar[ComputeStatus]
    COMPUTE_STATUS_STALE_INCARNATION: _ClassVar[ComputeStatus]
    COMPUTE_STATUS_NOT_HOSTED: _ClassVar[ComputeStatus]
    COMPUTE_STATUS_OVERLOADED: _ClassVar[ComputeStatus]
    COMPUTE_STATUS_BAD_REQUEST: _ClassVar[ComputeStatus]
    COMPUTE_STATUS_INTERNAL: _ClassVar[ComputeStatus]
    COMPUTE_STATUS_DRAINING: _ClassVar[ComputeStatus]
TENSOR_DTYPE_UNSPECIFIED: TensorDtype
TENSOR_DTYPE_BFLOAT16: TensorDtype
TENSOR_DTYPE_FLOAT32: TensorDtype
TENSOR_DTYPE_FP8_E4M3_BLOCK128: TensorDtype
COMBINE_MODE_UNSPECIFIED: CombineMode
COMBINE_MODE_REDUCED: CombineMode
COMBINE_MODE_EXACT: CombineMode
COMPUTE_STATUS_UNSPECIFIED: ComputeStatus
COMPUTE_STATUS_OK: ComputeStatus
COMPUTE_STATUS_STALE_INCARNATION: ComputeStatus
COMPUTE_STATUS_NOT_HOSTED: ComputeStatus
COMPUTE_STATUS_OVERLOADED: ComputeStatus
COMPUTE_STATUS_BAD_REQUEST: ComputeStatus
COMPUTE_STATUS_INTERNAL: ComputeStatus
COMPUTE_STATUS_DRAINING: ComputeStatus

class ExpertRange(_message.Message):
    __slots__ = ("layer_start", "layer_end", "expert_start", "expert_end")
    LAYER_START_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    EXPERT_START_FIELD_NUMBER: _ClassVar[int]
    EXPERT_END_FIELD_NUMBER: _ClassVar[int]
    layer_start: int
    layer_end: int
    expert_start: int
    expert_end: int
    def __init__(self, layer_start: _Optional[int] = ..., layer_end: _Optional[int] = ..., expert_start: _Optional[int] = ..., expert_end: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("group_name", "replica_id", "incarnation", "weight_digest", "numerics_id", "hosted", "hidden_size", "max_rows", "pid")
    GROUP_NAME_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_ID_FIELD_NUMBER: _ClassVar[int]
    HOSTED_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    group_name: str
    replica_id: str
    incarnation: int
    weight_digest: str
    numerics_id: str
    hosted: _containers.RepeatedCompositeFieldContainer[ExpertRange]
    hidden_size: int
    max_rows: int
    pid: int
    def __init__(self, group_name: _Optional[str] = ..., replica_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., weight_digest: _Optional[str] = ..., numerics_id: _Optional[str] = ..., hosted: _Optional[_Iterable[_Union[ExpertRange, _Mapping]]] = ..., hidden_size: _Optional[int] = ..., max_rows: _Optional[int] = ..., pid: _Optional[int] = ...) -> None: ...

class ComputeRequestHeader(_message.Message):
    __slots__ = ("frame_id", "incarnation", "table_version", "layer_id", "num_rows", "num_pairs", "hidden_size", "dtype", "combine", "deadline_ms", "reply_dtype")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TABLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_PAIRS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    COMBINE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    REPLY_DTYPE_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    incarnation: int
    table_version: int
    layer_id: int
    num_rows: int
    num_pairs: int
    hidden_size: int
    dtype: TensorDtype
    combine: CombineMode
    deadline_ms: int
    reply_dtype: TensorDtype
    def __init__(self, frame_id: _Optional[int] = ..., incarnation: _Optional[int] = ..., table_version: _Optional[int] = ..., layer_id: _Optional[int] = ..., num_rows: _Optional[int] = ..., num_pairs: _Optional[int] = ..., hidden_size: _Optional[int] = ..., dtype: _Optional[_Union[TensorDtype, str]] = ..., combine: _Optional[_Union[CombineMode, str]] = ..., deadline_ms: _Optional[int] = ..., reply_dtype: _Optional[_Union[TensorDtype, str]] = ...) -> None: ...

class ComputeRequest(_message.Message):
    __slots__ = ("header", "tensors")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    header: ComputeRequestHeader
    tensors: bytes
    def __init__(self, header: _Optional[_Union[ComputeRequestHeader, _Mapping]] = ..., tensors: _Optional[bytes] = ...) -> None: ...

class ComputeResponseHeader(_message.Message):
    __slots__ = ("frame_id", "incarnation", "status", "message", "num_rows", "hidden_size", "dtype", "queue_us", "compute_us")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    incarnation: int
    status: ComputeStatus
    message: str
    num_rows: int
    hidden_size: int
    dtype: TensorDtype
    queue_us: int
    compute_us: int
    def __init__(self, frame_id: _Optional[int] = ..., incarnation: _Optional[int] = ..., status: _Optional[_Union[ComputeStatus, str]] = ..., message: _Optional[str] = ..., num_rows: _Optional[int] = ..., hidden_size: _Optional[int] = ..., dtype: _Optional[_Union[TensorDtype, str]] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ...) -> None: ...

class ComputeResponse(_message.Message):
    __slots__ = ("header", "tensors")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    header: ComputeResponseHeader
    tensors: bytes
    def __init__(self, header: _Optional[_Union[ComputeResponseHeader, _Mapping]] = ..., tensors: _Optional[bytes] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("with_pairs",)
    WITH_PAIRS_FIELD_NUMBER: _ClassVar[int]
    with_pairs: bool
    def __init__(self, with_pairs: _Optional[bool] = ...) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("incarnation", "window_s", "busy_share", "queue_ms", "max_queue_ms", "num_frames", "num_pairs", "count_window_s", "layers")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    BUSY_SHARE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    NUM_PAIRS_FIELD_NUMBER: _ClassVar[int]
    COUNT_WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    window_s: float
    busy_share: float
    queue_ms: float
    max_queue_ms: float
    num_frames: int
    num_pairs: int
    count_window_s: float
    layers: _containers.RepeatedCompositeFieldContainer[LayerPairs]
    def __init__(self, incarnation: _Optional[int] = ..., window_s: _Optional[float] = ..., busy_share: _Optional[float] = ..., queue_ms: _Optional[float] = ..., max_queue_ms: _Optional[float] = ..., num_frames: _Optional[int] = ..., num_pairs: _Optional[int] = ..., count_window_s: _Optional[float] = ..., layers: _Optional[_Iterable[_Union[LayerPairs, _Mapping]]] = ...) -> None: ...

class LayerPairs(_message.Message):
    __slots__ = ("layer_id", "pairs")
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    layer_id: int
    pairs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer_id: _Optional[int] = ..., pairs: _Optional[_Iterable[int]] = ...) -> None: ...

class FetchExpertRequest(_message.Message):
    __slots__ = ("layer_id", "expert_id")
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERT_ID_FIELD_NUMBER: _ClassVar[int]
    layer_id: int
    expert_id: int
    def __init__(self, layer_id: _Optional[int] = ..., expert_id: _Optional[int] = ...) -> None: ...

class FetchExpertResponse(_message.Message):
    __slots__ = ("name", "dtype", "shape", "data", "expert_digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    EXPERT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    expert_digest: bytes
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., expert_digest: _Optional[bytes] = ...) -> None: ...
