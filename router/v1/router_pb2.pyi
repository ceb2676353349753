from experts.v1 import experts_pb2 as _experts_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]

class ReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATE_UNSPECIFIED: _ClassVar[ReplicaState]
    REPLICA_STATE_STARTING: _ClassVar[ReplicaState]
    REPLICA_STATE_READY: _ClassVar[ReplicaState]
    REPLICA_STATE_DRAINING: _ClassVar[ReplicaState]
    REPLICA_STATE_DEAD: _ClassVar[ReplicaState]

class TallyKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TALLY_KIND_UNSPECIFIED: _ClassVar[TallyKind]
    TALLY_KIND_ROUTER: _ClassVar[TallyKind]
    TALLY_KIND_FRONT: _ClassVar[TallyKind]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_STARTING: ReplicaState
REPLICA_STATE_READY: ReplicaState
REPLICA_STATE_DRAINING: ReplicaState
REPLICA_STATE_DEAD: ReplicaState
TALLY_KIND_UNSPECIFIED: TallyKind
TALLY_KIND_ROUTER: TallyKind
TALLY_KIND_FRONT: TallyKind

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("json_schema", "lark", "regex", "lenient", "start_after")
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    LARK_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    LENIENT_FIELD_NUMBER: _ClassVar[int]
    START_AFTER_FIELD_NUMBER: _ClassVar[int]
    json_schema: str
    lark: str
    regex: str
    lenient: bool
    start_after: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, json_schema: _Optional[str] = ..., lark: _Optional[str] = ..., regex: _Optional[str] = ..., lenient: _Optional[bool] = ..., start_after: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "sampling", "max_tokens", "stop_token_ids", "ignore_eos", "min_tokens", "logprobs", "prompt_logprobs", "num_answer_tokens", "priority", "fairness_key", "cache_salt", "fairness_weight", "weights_version", "grammar", "traceparent")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_ANSWER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    FAIRNESS_KEY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    FAIRNESS_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    min_tokens: int
    logprobs: int
    prompt_logprobs: int
    num_answer_tokens: int
    priority: int
    fairness_key: str
    cache_salt: str
    fairness_weight: float
    weights_version: int
    grammar: Grammar
    traceparent: str
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., min_tokens: _Optional[int] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., num_answer_tokens: _Optional[int] = ..., priority: _Optional[int] = ..., fairness_key: _Optional[str] = ..., cache_salt: _Optional[str] = ..., fairness_weight: _Optional[float] = ..., weights_version: _Optional[int] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ..., traceparent: _Optional[str] = ...) -> None: ...

class TokenOutput(_message.Message):
    __slots__ = ("token_id", "logprob", "top_token_ids", "top_logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("tokens", "prompt_tokens", "finish_reason", "stop_token_id", "cached_tokens", "router_us", "expert_us", "num_left_out", "weights_version", "times")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROUTER_US_FIELD_NUMBER: _ClassVar[int]
    EXPERT_US_FIELD_NUMBER: _ClassVar[int]
    NUM_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[TokenOutput]
    prompt_tokens: _containers.RepeatedCompositeFieldContainer[TokenOutput]
    finish_reason: FinishReason
    stop_token_id: int
    cached_tokens: int
    router_us: int
    expert_us: int
    num_left_out: int
    weights_version: int
    times: SequenceTimes
    def __init__(self, tokens: _Optional[_Iterable[_Union[TokenOutput, _Mapping]]] = ..., prompt_tokens: _Optional[_Iterable[_Union[TokenOutput, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., stop_token_id: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., router_us: _Optional[int] = ..., expert_us: _Optional[int] = ..., num_left_out: _Optional[int] = ..., weights_version: _Optional[int] = ..., times: _Optional[_Union[SequenceTimes, _Mapping]] = ...) -> None: ...

class SequenceTimes(_message.Message):
    __slots__ = ("queue_us", "prefill_us", "decode_us")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    PREFILL_US_FIELD_NUMBER: _ClassVar[int]
    DECODE_US_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    prefill_us: int
    decode_us: int
    def __init__(self, queue_us: _Optional[int] = ..., prefill_us: _Optional[int] = ..., decode_us: _Optional[int] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("replica_id", "endpoint", "incarnation", "weight_digest", "numerics_id", "state")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    endpoint: str
    incarnation: int
    weight_digest: str
    numerics_id: str
    state: ReplicaState
    def __init__(self, replica_id: _Optional[str] = ..., endpoint: _Optional[str] = ..., incarnation: _Optional[int] = ..., weight_digest: _Optional[str] = ..., numerics_id: _Optional[str] = ..., state: _Optional[_Union[ReplicaState, str]] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("name", "hosted", "replicas")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HOSTED_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    name: str
    hosted: _containers.RepeatedCompositeFieldContainer[_experts_pb2.ExpertRange]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    def __init__(self, name: _Optional[str] = ..., hosted: _Optional[_Iterable[_Union[_experts_pb2.ExpertRange, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ...) -> None: ...

class ExpertTable(_message.Message):
    __slots__ = ("version", "groups")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    version: int
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    def __init__(self, version: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ...) -> None: ...

class UpdateExpertTableRequest(_message.Message):
    __slots__ = ("table",)
    TABLE_FIELD_NUMBER: _ClassVar[int]
    table: ExpertTable
    def __init__(self, table: _Optional[_Union[ExpertTable, _Mapping]] = ...) -> None: ...

class UpdateExpertTableResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_ms",)
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    timeout_ms: int
    def __init__(self, timeout_ms: _Optional[int] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("num_running",)
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    def __init__(self, num_running: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("router_id", "pid", "ready", "draining", "message", "table_version", "num_running", "num_waiting", "num_steps", "current_step_ms", "connected_replica_ids", "load_progress", "num_blocks", "num_blocks_held", "num_blocks_idle", "block_size", "num_preemptions", "num_prompt_tokens", "num_cached_tokens", "step_times", "num_turns", "num_generated_tokens", "num_drafted", "num_accepted", "unserved_ms", "dispatch", "replicas", "groups", "teams", "process", "weights_version")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TABLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    CURRENT_STEP_MS_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_REPLICA_IDS_FIELD_NUMBER: _ClassVar[int]
    LOAD_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_HELD_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_IDLE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_TIMES_FIELD_NUMBER: _ClassVar[int]
    NUM_TURNS_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTED_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    UNSERVED_MS_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    TEAMS_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    pid: int
    ready: bool
    draining: bool
    message: str
    table_version: int
    num_running: int
    num_waiting: int
    num_steps: int
    current_step_ms: int
    connected_replica_ids: _containers.RepeatedScalarFieldContainer[str]
    load_progress: float
    num_blocks: int
    num_blocks_held: int
    num_blocks_idle: int
    block_size: int
    num_preemptions: int
    num_prompt_tokens: int
    num_cached_tokens: int
    step_times: StepTimes
    num_turns: int
    num_generated_tokens: int
    num_drafted: _containers.RepeatedScalarFieldContainer[int]
    num_accepted: _containers.RepeatedScalarFieldContainer[int]
    unserved_ms: int
    dispatch: DispatchCounters
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaTimes]
    groups: _containers.RepeatedCompositeFieldContainer[GroupTraffic]
    teams: _containers.RepeatedCompositeFieldContainer[TeamQueue]
    process: ProcessFigures
    weights_version: int
    def __init__(self, router_id: _Optional[str] = ..., pid: _Optional[int] = ..., ready: _Optional[bool] = ..., draining: _Optional[bool] = ..., message: _Optional[str] = ..., table_version: _Optional[int] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_steps: _Optional[int] = ..., current_step_ms: _Optional[int] = ..., connected_replica_ids: _Optional[_Iterable[str]] = ..., load_progress: _Optional[float] = ..., num_blocks: _Optional[int] = ..., num_blocks_held: _Optional[int] = ..., num_blocks_idle: _Optional[int] = ..., block_size: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., step_times: _Optional[_Union[StepTimes, _Mapping]] = ..., num_turns: _Optional[int] = ..., num_generated_tokens: _Optional[int] = ..., num_drafted: _Optional[_Iterable[int]] = ..., num_accepted: _Optional[_Iterable[int]] = ..., unserved_ms: _Optional[int] = ..., dispatch: _Optional[_Union[DispatchCounters, _Mapping]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaTimes, _Mapping]]] = ..., groups: _Optional[_Iterable[_Union[GroupTraffic, _Mapping]]] = ..., teams: _Optional[_Iterable[_Union[TeamQueue, _Mapping]]] = ..., process: _Optional[_Union[ProcessFigures, _Mapping]] = ..., weights_version: _Optional[int] = ...) -> None: ...

class GroupTraffic(_message.Message):
    __slots__ = ("name", "num_frames", "num_rows", "num_pairs", "sent_bytes", "received_bytes", "num_retries", "num_hedges", "latency_counts", "latency_us")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_PAIRS_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_RETRIES_FIELD_NUMBER: _ClassVar[int]
    NUM_HEDGES_FIELD_NUMBER: _ClassVar[int]
    LATENCY_COUNTS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_frames: int
    num_rows: int
    num_pairs: int
    sent_bytes: int
    received_bytes: int
    num_retries: int
    num_hedges: int
    latency_counts: _containers.RepeatedScalarFieldContainer[int]
    latency_us: int
    def __init__(self, name: _Optional[str] = ..., num_frames: _Optional[int] = ..., num_rows: _Optional[int] = ..., num_pairs: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., received_bytes: _Optional[int] = ..., num_retries: _Optional[int] = ..., num_hedges: _Optional[int] = ..., latency_counts: _Optional[_Iterable[int]] = ..., latency_us: _Optional[int] = ...) -> None: ...

class TeamQueue(_message.Message):
    __slots__ = ("fairness_key", "num_running", "num_waiting")
    FAIRNESS_KEY_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    fairness_key: str
    num_running: int
    num_waiting: int
    def __init__(self, fairness_key: _Optional[str] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ...) -> None: ...

class ProcessFigures(_message.Message):
    __slots__ = ("cpu_ms", "resident_bytes", "num_threads", "num_open_files", "started_ms")
    CPU_MS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    NUM_OPEN_FILES_FIELD_NUMBER: _ClassVar[int]
    STARTED_MS_FIELD_NUMBER: _ClassVar[int]
    cpu_ms: int
    resident_bytes: int
    num_threads: int
    num_open_files: int
    started_ms: int
    def __init__(self, cpu_ms: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., num_threads: _Optional[int] = ..., num_open_files: _Optional[int] = ..., started_ms: _Optional[int] = ...) -> None: ...

class DispatchCounters(_message.Message):
    __slots__ = ("num_frames", "num_retries", "num_replans", "num_hedges", "num_hedges_won", "num_probes", "num_rerouted", "num_missed_heartbeats", "num_dead_replicas", "num_crossings", "errors", "num_left_out")
    class ErrorsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    NUM_RETRIES_FIELD_NUMBER: _ClassVar[int]
    NUM_REPLANS_FIELD_NUMBER: _ClassVar[int]
    NUM_HEDGES_FIELD_NUMBER: _ClassVar[int]
    NUM_HEDGES_WON_FIELD_NUMBER: _ClassVar[int]
    NUM_PROBES_FIELD_NUMBER: _ClassVar[int]
    NUM_REROUTED_FIELD_NUMBER: _ClassVar[int]
    NUM_MISSED_HEARTBEATS_FIELD_NUMBER: _ClassVar[int]
    NUM_DEAD_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    NUM_CROSSINGS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    NUM_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    num_frames: int
    num_retries: int
    num_replans: int
    num_hedges: int
    num_hedges_won: int
    num_probes: int
    num_rerouted: int
    num_missed_heartbeats: int
    num_dead_replicas: int
    num_crossings: int
    errors: _containers.ScalarMap[str, int]
    num_left_out: int
    def __init__(self, num_frames: _Optional[int] = ..., num_retries: _Optional[int] = ..., num_replans: _Optional[int] = ..., num_hedges: _Optional[int] = ..., num_hedges_won: _Optional[int] = ..., num_probes: _Optional[int] = ..., num_rerouted: _Optional[int] = ..., num_missed_heartbeats: _Optional[int] = ..., num_dead_replicas: _Optional[int] = ..., num_crossings: _Optional[int] = ..., errors: _Optional[_Mapping[str, int]] = ..., num_left_out: _Optional[int] = ...) -> None: ...

class ReplicaTimes(_message.Message):
    __slots__ = ("replica_id", "connected", "num_frames", "num_outstanding", "slowness", "frame_ms")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTSTANDING_FIELD_NUMBER: _ClassVar[int]
    SLOWNESS_FIELD_NUMBER: _ClassVar[int]
    FRAME_MS_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    connected: bool
    num_frames: int
    num_outstanding: int
    slowness: float
    frame_ms: float
    def __init__(self, replica_id: _Optional[str] = ..., connected: _Optional[bool] = ..., num_frames: _Optional[int] = ..., num_outstanding: _Optional[int] = ..., slowness: _Optional[float] = ..., frame_ms: _Optional[float] = ...) -> None: ...

class StepTimes(_message.Message):
    __slots__ = ("attention_ns", "gate_ns", "scatter_ns", "wait_ns", "shared_ns", "head_ns", "sample_ns", "overhead_ns", "step_ns")
    ATTENTION_NS_FIELD_NUMBER: _ClassVar[int]
    GATE_NS_FIELD_NUMBER: _ClassVar[int]
    SCATTER_NS_FIELD_NUMBER: _ClassVar[int]
    WAIT_NS_FIELD_NUMBER: _ClassVar[int]
    SHARED_NS_FIELD_NUMBER: _ClassVar[int]
    HEAD_NS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_NS_FIELD_NUMBER: _ClassVar[int]
    OVERHEAD_NS_FIELD_NUMBER: _ClassVar[int]
    STEP_NS_FIELD_NUMBER: _ClassVar[int]
    attention_ns: int
    gate_ns: int
    scatter_ns: int
    wait_ns: int
    shared_ns: int
    head_ns: int
    sample_ns: int
    overhead_ns: int
    step_ns: int
    def __init__(self, attention_ns: _Optional[int] = ..., gate_ns: _Optional[int] = ..., scatter_ns: _Optional[int] = ..., wait_ns: _Optional[int] = ..., shared_ns: _Optional[int] = ..., head_ns: _Optional[int] = ..., sample_ns: _Optional[int] = ..., overhead_ns: _Optional[int] = ..., step_ns: _Optional[int] = ...) -> None: ...

class Tally(_message.Message):
    __slots__ = ("source", "number", "kind", "accounts")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ACCOUNTS_FIELD_NUMBER: _ClassVar[int]
    source: str
    number: int
    kind: TallyKind
    accounts: _containers.RepeatedCompositeFieldContainer[AccountTally]
    def __init__(self, source: _Optional[str] = ..., number: _Optional[int] = ..., kind: _Optional[_Union[TallyKind, str]] = ..., accounts: _Optional[_Iterable[_Union[AccountTally, _Mapping]]] = ...) -> None: ...

class AccountTally(_message.Message):
    __slots__ = ("account", "band", "service", "is_backlogged", "num_requests", "num_tokens", "num_running")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    BAND_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    IS_BACKLOGGED_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    account: str
    band: int
    service: float
    is_backlogged: bool
    num_requests: int
    num_tokens: int
    num_running: int
    def __init__(self, account: _Optional[str] = ..., band: _Optional[int] = ..., service: _Optional[float] = ..., is_backlogged: _Optional[bool] = ..., num_requests: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_running: _Optional[int] = ...) -> None: ...

class ExchangeTalliesRequest(_message.Message):
    __slots__ = ("tallies",)
    TALLIES_FIELD_NUMBER: _ClassVar[int]
    tallies: _containers.RepeatedCompositeFieldContainer[Tally]
    def __init__(self, tallies: _Optional[_Iterable[_Union[Tally, _Mapping]]] = ...) -> None: ...

class ExchangeTalliesResponse(_message.Message):
    __slots__ = ("tallies",)
    TALLIES_FIELD_NUMBER: _ClassVar[int]
    tallies: _containers.RepeatedCompositeFieldContainer[Tally]
    def __init__(self, tallies: _Optional[_Iterable[_Union[Tally, _Mapping]]] = ...) -> None: ...
