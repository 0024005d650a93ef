import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FramePolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FRAME_POLICY_UNSPECIFIED: _ClassVar[FramePolicy]
    FRAME_POLICY_TRIM: _ClassVar[FramePolicy]
    FRAME_POLICY_PAD: _ClassVar[FramePolicy]
    FRAME_POLICY_REFERENCE: _ClassVar[FramePolicy]

class ImageFit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_FIT_UNSPECIFIED: _ClassVar[ImageFit]
    IMAGE_FIT_CROP: _ClassVar[ImageFit]
    IMAGE_FIT_STRETCH: _ClassVar[ImageFit]

class Reproducible(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPRODUCIBLE_UNSPECIFIED: _ClassVar[Reproducible]
    REPRODUCIBLE_STRICT: _ClassVar[Reproducible]

class Profile(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROFILE_UNSPECIFIED: _ClassVar[Profile]
    PROFILE_QUALITY: _ClassVar[Profile]
    PROFILE_REALTIME: _ClassVar[Profile]

class ServiceClass(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SERVICE_CLASS_UNSPECIFIED: _ClassVar[ServiceClass]
    SERVICE_CLASS_REALTIME: _ClassVar[ServiceClass]
    SERVICE_CLASS_OFFLINE: _ClassVar[ServiceClass]

class Container(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONTAINER_UNSPECIFIED: _ClassVar[Container]
    CONTAINER_FMP4: _ClassVar[Container]
    CONTAINER_RAW_RGB24: _ClassVar[Container]
    CONTAINER_RAW_YUV420P: _ClassVar[Container]

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_H264: _ClassVar[Codec]
    CODEC_VP9: _ClassVar[Codec]
    CODEC_AV1: _ClassVar[Codec]

class VideoStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VIDEO_STATUS_UNSPECIFIED: _ClassVar[VideoStatus]
    VIDEO_STATUS_QUEUED: _ClassVar[VideoStatus]
    VIDEO_STATUS_IN_PROGRESS: _ClassVar[VideoStatus]
    VIDEO_STATUS_COMPLETED: _ClassVar[VideoStatus]
    VIDEO_STATUS_FAILED: _ClassVar[VideoStatus]
    VIDEO_STATUS_CANCELLED: _ClassVar[VideoStatus]
    VIDEO_STATUS_EXPIRED: _ClassVar[VideoStatus]

class Variant(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VARIANT_UNSPECIFIED: _ClassVar[Variant]
    VARIANT_VIDEO: _ClassVar[Variant]
    VARIANT_THUMBNAIL: _ClassVar[Variant]
    VARIANT_SPRITESHEET: _ClassVar[Variant]
    VARIANT_LAST_FRAME: _ClassVar[Variant]

class Action(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTION_UNSPECIFIED: _ClassVar[Action]
    ACTION_PAUSE: _ClassVar[Action]
    ACTION_RESUME: _ClassVar[Action]
    ACTION_RESET: _ClassVar[Action]
    ACTION_STOP: _ClassVar[Action]

class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATE_UNSPECIFIED: _ClassVar[State]
    STATE_RUNNING: _ClassVar[State]
    STATE_PAUSED: _ClassVar[State]
    STATE_WAITING_FOR_CREDIT: _ClassVar[State]
FRAME_POLICY_UNSPECIFIED: FramePolicy
FRAME_POLICY_TRIM: FramePolicy
FRAME_POLICY_PAD: FramePolicy
FRAME_POLICY_REFERENCE: FramePolicy
IMAGE_FIT_UNSPECIFIED: ImageFit
IMAGE_FIT_CROP: ImageFit
IMAGE_FIT_STRETCH: ImageFit
REPRODUCIBLE_UNSPECIFIED: Reproducible
REPRODUCIBLE_STRICT: Reproducible
PROFILE_UNSPECIFIED: Profile
PROFILE_QUALITY: Profile
PROFILE_REALTIME: Profile
SERVICE_CLASS_UNSPECIFIED: ServiceClass
SERVICE_CLASS_REALTIME: ServiceClass
SERVICE_CLASS_OFFLINE: ServiceClass
CONTAINER_UNSPECIFIED: Container
CONTAINER_FMP4: Container
CONTAINER_RAW_RGB24: Container
CONTAINER_RAW_YUV420P: Container
CODEC_UNSPECIFIED: Codec
CODEC_H264: Codec
CODEC_VP9: Codec
CODEC_AV1: Codec
VIDEO_STATUS_UNSPECIFIED: VideoStatus
VIDEO_STATUS_QUEUED: VideoStatus
VIDEO_STATUS_IN_PROGRESS: VideoStatus
VIDEO_STATUS_COMPLETED: VideoStatus
VIDEO_STATUS_FAILED: VideoStatus
VIDEO_STATUS_CANCELLED: VideoStatus
VIDEO_STATUS_EXPIRED: VideoStatus
VARIANT_UNSPECIFIED: Variant
VARIANT_VIDEO: Variant
VARIANT_THUMBNAIL: Variant
VARIANT_SPRITESHEET: Variant
VARIANT_LAST_FRAME: Variant
ACTION_UNSPECIFIED: Action
ACTION_PAUSE: Action
ACTION_RESUME: Action
ACTION_RESET: Action
ACTION_STOP: Action
STATE_UNSPECIFIED: State
STATE_RUNNING: State
STATE_PAUSED: State
STATE_WAITING_FOR_CREDIT: State

class VideoSpec(_message.Message):
    __slots__ = ("model", "prompt", "negative_prompt", "width", "height", "num_frames", "seconds", "fps", "seed", "image", "video", "prompts", "helios", "output", "priority", "user", "metadata", "queue_timeout")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    VIDEO_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    HELIOS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    seconds: float
    fps: float
    seed: int
    image: Media
    video: Media
    prompts: _containers.RepeatedCompositeFieldContainer[PromptAt]
    helios: HeliosParams
    output: OutputOptions
    priority: int
    user: str
    metadata: _containers.ScalarMap[str, str]
    queue_timeout: _duration_pb2.Duration
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., num_frames: _Optional[int] = ..., seconds: _Optional[float] = ..., fps: _Optional[float] = ..., seed: _Optional[int] = ..., image: _Optional[_Union[Media, _Mapping]] = ..., video: _Optional[_Union[Media, _Mapping]] = ..., prompts: _Optional[_Iterable[_Union[PromptAt, _Mapping]]] = ..., helios: _Optional[_Union[HeliosParams, _Mapping]] = ..., output: _Optional[_Union[OutputOptions, _Mapping]] = ..., priority: _Optional[int] = ..., user: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., queue_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Media(_message.Message):
    __slots__ = ("data", "url", "file_id", "video_id", "mime_type")
    DATA_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    FILE_ID_FIELD_NUMBER: _ClassVar[int]
    VIDEO_ID_FIELD_NUMBER: _ClassVar[int]
    MIME_TYPE_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    url: str
    file_id: str
    video_id: str
    mime_type: str
    def __init__(self, data: _Optional[bytes] = ..., url: _Optional[str] = ..., file_id: _Optional[str] = ..., video_id: _Optional[str] = ..., mime_type: _Optional[str] = ...) -> None: ...

class PromptAt(_message.Message):
    __slots__ = ("chunk", "prompt", "transition_chunks")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TRANSITION_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    chunk: int
    prompt: str
    transition_chunks: int
    def __init__(self, chunk: _Optional[int] = ..., prompt: _Optional[str] = ..., transition_chunks: _Optional[int] = ...) -> None: ...

class HeliosParams(_message.Message):
    __slots__ = ("guidance_scale", "steps", "amplify_first_chunk", "skip_first_chunk", "image_noise_sigma_min", "image_noise_sigma_max", "video_noise_sigma_min", "video_noise_sigma_max", "use_zero_init", "zero_steps", "frame_policy", "image_fit", "profile", "service_class", "reproducible")
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    AMPLIFY_FIRST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIRST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    IMAGE_NOISE_SIGMA_MIN_FIELD_NUMBER: _ClassVar[int]
    IMAGE_NOISE_SIGMA_MAX_FIELD_NUMBER: _ClassVar[int]
    VIDEO_NOISE_SIGMA_MIN_FIELD_NUMBER: _ClassVar[int]
    VIDEO_NOISE_SIGMA_MAX_FIELD_NUMBER: _ClassVar[int]
    USE_ZERO_INIT_FIELD_NUMBER: _ClassVar[int]
    ZERO_STEPS_FIELD_NUMBER: _ClassVar[int]
    FRAME_POLICY_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIT_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    SERVICE_CLASS_FIELD_NUMBER: _ClassVar[int]
    REPRODUCIBLE_FIELD_NUMBER: _ClassVar[int]
    guidance_scale: float
    steps: _containers.RepeatedScalarFieldContainer[int]
    amplify_first_chunk: bool
    skip_first_chunk: bool
    image_noise_sigma_min: float
    image_noise_sigma_max: float
    video_noise_sigma_min: float
    video_noise_sigma_max: float
    use_zero_init: bool
    zero_steps: int
    frame_policy: FramePolicy
    image_fit: ImageFit
    profile: Profile
    service_class: ServiceClass
    reproducible: Reproducible
    def __init__(self, guidance_scale: _Optional[float] = ..., steps: _Optional[_Iterable[int]] = ..., amplify_first_chunk: _Optional[bool] = ..., skip_first_chunk: _Optional[bool] = ..., image_noise_sigma_min: _Optional[float] = ..., image_noise_sigma_max: _Optional[float] = ..., video_noise_sigma_min: _Optional[float] = ..., video_noise_sigma_max: _Optional[float] = ..., use_zero_init: _Optional[bool] = ..., zero_steps: _Optional[int] = ..., frame_policy: _Optional[_Union[FramePolicy, str]] = ..., image_fit: _Optional[_Union[ImageFit, str]] = ..., profile: _Optional[_Union[Profile, str]] = ..., service_class: _Optional[_Union[ServiceClass, str]] = ..., reproducible: _Optional[_Union[Reproducible, str]] = ...) -> None: ...

class OutputOptions(_message.Message):
    __slots__ = ("container", "codec", "crf", "inline_segments", "sub_chunks")
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CRF_FIELD_NUMBER: _ClassVar[int]
    INLINE_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    SUB_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    container: Container
    codec: Codec
    crf: int
    inline_segments: bool
    sub_chunks: bool
    def __init__(self, container: _Optional[_Union[Container, str]] = ..., codec: _Optional[_Union[Codec, str]] = ..., crf: _Optional[int] = ..., inline_segments: _Optional[bool] = ..., sub_chunks: _Optional[bool] = ...) -> None: ...

class Video(_message.Message):
    __slots__ = ("id", "model", "status", "progress", "created_at", "started_at", "completed_at", "expires_at", "prompt", "width", "height", "fps", "num_frames", "seconds", "seed", "num_chunks", "chunks_done", "queue_position", "eta_seconds", "url", "mime_type", "size_bytes", "error", "timing", "remixed_from_video_id", "extended_from_video_id", "user", "metadata", "warnings", "approximations")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_DONE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    ETA_SECONDS_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    MIME_TYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    REMIXED_FROM_VIDEO_ID_FIELD_NUMBER: _ClassVar[int]
    EXTENDED_FROM_VIDEO_ID_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    APPROXIMATIONS_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    status: VideoStatus
    progress: int
    created_at: _timestamp_pb2.Timestamp
    started_at: _timestamp_pb2.Timestamp
    completed_at: _timestamp_pb2.Timestamp
    expires_at: _timestamp_pb2.Timestamp
    prompt: str
    width: int
    height: int
    fps: float
    num_frames: int
    seconds: float
    seed: int
    num_chunks: int
    chunks_done: int
    queue_position: int
    eta_seconds: float
    url: str
    mime_type: str
    size_bytes: int
    error: Error
    timing: Timing
    remixed_from_video_id: str
    extended_from_video_id: str
    user: str
    metadata: _containers.ScalarMap[str, str]
    warnings: _containers.RepeatedCompositeFieldContainer[Warning]
    approximations: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., status: _Optional[_Union[VideoStatus, str]] = ..., progress: _Optional[int] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., completed_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., prompt: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., fps: _Optional[float] = ..., num_frames: _Optional[int] = ..., seconds: _Optional[float] = ..., seed: _Optional[int] = ..., num_chunks: _Optional[int] = ..., chunks_done: _Optional[int] = ..., queue_position: _Optional[int] = ..., eta_seconds: _Optional[float] = ..., url: _Optional[str] = ..., mime_type: _Optional[str] = ..., size_bytes: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., remixed_from_video_id: _Optional[str] = ..., extended_from_video_id: _Optional[str] = ..., user: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., warnings: _Optional[_Iterable[_Union[Warning, _Mapping]]] = ..., approximations: _Optional[_Iterable[str]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "param", "type")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    param: str
    type: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., param: _Optional[str] = ..., type: _Optional[str] = ...) -> None: ...

class Warning(_message.Message):
    __slots__ = ("param", "message")
    PARAM_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    param: str
    message: str
    def __init__(self, param: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_ms", "encode_ms", "first_segment_ms", "denoise_ms", "decode_ms", "mux_ms", "total_ms", "gpu_seconds", "generated_fps")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_MS_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEGMENT_MS_FIELD_NUMBER: _ClassVar[int]
    DENOISE_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    MUX_MS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    GPU_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_FPS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    encode_ms: float
    first_segment_ms: float
    denoise_ms: float
    decode_ms: float
    mux_ms: float
    total_ms: float
    gpu_seconds: float
    generated_fps: float
    def __init__(self, queue_ms: _Optional[float] = ..., encode_ms: _Optional[float] = ..., first_segment_ms: _Optional[float] = ..., denoise_ms: _Optional[float] = ..., decode_ms: _Optional[float] = ..., mux_ms: _Optional[float] = ..., total_ms: _Optional[float] = ..., gpu_seconds: _Optional[float] = ..., generated_fps: _Optional[float] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("video", "mime_type", "init_segment", "recommended_preroll_seconds", "recommended_playback_rate")
    VIDEO_FIELD_NUMBER: _ClassVar[int]
    MIME_TYPE_FIELD_NUMBER: _ClassVar[int]
    INIT_SEGMENT_FIELD_NUMBER: _ClassVar[int]
    RECOMMENDED_PREROLL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RECOMMENDED_PLAYBACK_RATE_FIELD_NUMBER: _ClassVar[int]
    video: Video
    mime_type: str
    init_segment: bytes
    recommended_preroll_seconds: float
    recommended_playback_rate: float
    def __init__(self, video: _Optional[_Union[Video, _Mapping]] = ..., mime_type: _Optional[str] = ..., init_segment: _Optional[bytes] = ..., recommended_preroll_seconds: _Optional[float] = ..., recommended_playback_rate: _Optional[float] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("percent", "phase", "chunk", "num_chunks", "stage", "step", "num_steps", "queue_position", "eta_seconds")
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    ETA_SECONDS_FIELD_NUMBER: _ClassVar[int]
    percent: int
    phase: str
    chunk: int
    num_chunks: int
    stage: int
    step: int
    num_steps: int
    queue_position: int
    eta_seconds: float
    def __init__(self, percent: _Optional[int] = ..., phase: _Optional[str] = ..., chunk: _Optional[int] = ..., num_chunks: _Optional[int] = ..., stage: _Optional[int] = ..., step: _Optional[int] = ..., num_steps: _Optional[int] = ..., queue_position: _Optional[int] = ..., eta_seconds: _Optional[float] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("index", "start_frame", "num_frames", "pts_seconds", "duration_seconds", "data", "part", "num_parts", "is_last", "prompt", "prompt_weight", "generated_ms")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    START_FRAME_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    PTS_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DURATION_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTS_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    GENERATED_MS_FIELD_NUMBER: _ClassVar[int]
    index: int
    start_frame: int
    num_frames: int
    pts_seconds: float
    duration_seconds: float
    data: bytes
    part: int
    num_parts: int
    is_last: bool
    prompt: str
    prompt_weight: float
    generated_ms: float
    def __init__(self, index: _Optional[int] = ..., start_frame: _Optional[int] = ..., num_frames: _Optional[int] = ..., pts_seconds: _Optional[float] = ..., duration_seconds: _Optional[float] = ..., data: _Optional[bytes] = ..., part: _Optional[int] = ..., num_parts: _Optional[int] = ..., is_last: _Optional[bool] = ..., prompt: _Optional[str] = ..., prompt_weight: _Optional[float] = ..., generated_ms: _Optional[float] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("spec", "detach")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    DETACH_FIELD_NUMBER: _ClassVar[int]
    spec: VideoSpec
    detach: bool
    def __init__(self, spec: _Optional[_Union[VideoSpec, _Mapping]] = ..., detach: _Optional[bool] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("accepted", "progress", "segment", "completed", "failed")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    progress: Progress
    segment: Segment
    completed: Video
    failed: Video
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., segment: _Optional[_Union[Segment, _Mapping]] = ..., completed: _Optional[_Union[Video, _Mapping]] = ..., failed: _Optional[_Union[Video, _Mapping]] = ...) -> None: ...

class WatchVideoRequest(_message.Message):
    __slots__ = ("id", "from_segment", "inline_segments")
    ID_FIELD_NUMBER: _ClassVar[int]
    FROM_SEGMENT_FIELD_NUMBER: _ClassVar[int]
    INLINE_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    from_segment: int
    inline_segments: bool
    def __init__(self, id: _Optional[str] = ..., from_segment: _Optional[int] = ..., inline_segments: _Optional[bool] = ...) -> None: ...

class WatchVideoResponse(_message.Message):
    __slots__ = ("accepted", "progress", "segment", "completed", "failed")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    progress: Progress
    segment: Segment
    completed: Video
    failed: Video
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., segment: _Optional[_Union[Segment, _Mapping]] = ..., completed: _Optional[_Union[Video, _Mapping]] = ..., failed: _Optional[_Union[Video, _Mapping]] = ...) -> None: ...

class CreateVideoRequest(_message.Message):
    __slots__ = ("spec", "webhook_url", "expires_after", "remix_video_id", "extend_video_id")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    WEBHOOK_URL_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AFTER_FIELD_NUMBER: _ClassVar[int]
    REMIX_VIDEO_ID_FIELD_NUMBER: _ClassVar[int]
    EXTEND_VIDEO_ID_FIELD_NUMBER: _ClassVar[int]
    spec: VideoSpec
    webhook_url: str
    expires_after: _duration_pb2.Duration
    remix_video_id: str
    extend_video_id: str
    def __init__(self, spec: _Optional[_Union[VideoSpec, _Mapping]] = ..., webhook_url: _Optional[str] = ..., expires_after: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., remix_video_id: _Optional[str] = ..., extend_video_id: _Optional[str] = ...) -> None: ...

class CreateVideoResponse(_message.Message):
    __slots__ = ("video",)
    VIDEO_FIELD_NUMBER: _ClassVar[int]
    video: Video
    def __init__(self, video: _Optional[_Union[Video, _Mapping]] = ...) -> None: ...

class GetVideoRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class GetVideoResponse(_message.Message):
    __slots__ = ("video",)
    VIDEO_FIELD_NUMBER: _ClassVar[int]
    video: Video
    def __init__(self, video: _Optional[_Union[Video, _Mapping]] = ...) -> None: ...

class ListVideosRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "ascending", "statuses")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ASCENDING_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    ascending: bool
    statuses: _containers.RepeatedScalarFieldContainer[VideoStatus]
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., ascending: _Optional[bool] = ..., statuses: _Optional[_Iterable[_Union[VideoStatus, str]]] = ...) -> None: ...

class ListVideosResponse(_message.Message):
    __slots__ = ("videos", "next_page_token")
    VIDEOS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    videos: _containers.RepeatedCompositeFieldContainer[Video]
    next_page_token: str
    def __init__(self, videos: _Optional[_Iterable[_Union[Video, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class CancelVideoRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class CancelVideoResponse(_message.Message):
    __slots__ = ("video",)
    VIDEO_FIELD_NUMBER: _ClassVar[int]
    video: Video
    def __init__(self, video: _Optional[_Union[Video, _Mapping]] = ...) -> None: ...

class DeleteVideoRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DeleteVideoResponse(_message.Message):
    __slots__ = ("id", "deleted")
    ID_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    id: str
    deleted: bool
    def __init__(self, id: _Optional[str] = ..., deleted: _Optional[bool] = ...) -> None: ...

class DownloadVideoRequest(_message.Message):
    __slots__ = ("id", "variant", "offset", "limit")
    ID_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    id: str
    variant: Variant
    offset: int
    limit: int
    def __init__(self, id: _Optional[str] = ..., variant: _Optional[_Union[Variant, str]] = ..., offset: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class DownloadVideoResponse(_message.Message):
    __slots__ = ("offset", "data", "total_size", "mime_type", "etag")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SIZE_FIELD_NUMBER: _ClassVar[int]
    MIME_TYPE_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    total_size: int
    mime_type: str
    etag: str
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ..., total_size: _Optional[int] = ..., mime_type: _Optional[str] = ..., etag: _Optional[str] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("event_id", "start", "prompt", "control", "ack")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    event_id: str
    start: SessionStart
    prompt: PromptUpdate
    control: Control
    ack: Ack
    def __init__(self, event_id: _Optional[str] = ..., start: _Optional[_Union[SessionStart, _Mapping]] = ..., prompt: _Optional[_Union[PromptUpdate, _Mapping]] = ..., control: _Optional[_Union[Control, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ...) -> None: ...

class SessionStart(_message.Message):
    __slots__ = ("spec", "max_ahead_segments", "resume")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    MAX_AHEAD_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    spec: VideoSpec
    max_ahead_segments: int
    resume: SessionResume
    def __init__(self, spec: _Optional[_Union[VideoSpec, _Mapping]] = ..., max_ahead_segments: _Optional[int] = ..., resume: _Optional[_Union[SessionResume, _Mapping]] = ...) -> None: ...

class SessionResume(_message.Message):
    __slots__ = ("id", "from_segment")
    ID_FIELD_NUMBER: _ClassVar[int]
    FROM_SEGMENT_FIELD_NUMBER: _ClassVar[int]
    id: str
    from_segment: int
    def __init__(self, id: _Optional[str] = ..., from_segment: _Optional[int] = ...) -> None: ...

class PromptUpdate(_message.Message):
    __slots__ = ("prompt", "transition_chunks")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TRANSITION_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    transition_chunks: int
    def __init__(self, prompt: _Optional[str] = ..., transition_chunks: _Optional[int] = ...) -> None: ...

class Control(_message.Message):
    __slots__ = ("action", "seed")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    action: Action
    seed: int
    def __init__(self, action: _Optional[_Union[Action, str]] = ..., seed: _Optional[int] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("segment", "buffered_seconds")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    BUFFERED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    segment: int
    buffered_seconds: float
    def __init__(self, segment: _Optional[int] = ..., buffered_seconds: _Optional[float] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("started", "progress", "segment", "prompt_queued", "prompt_applied", "state_changed", "rejected", "ended")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_QUEUED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_APPLIED_FIELD_NUMBER: _ClassVar[int]
    STATE_CHANGED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    started: Accepted
    progress: Progress
    segment: Segment
    prompt_queued: PromptQueued
    prompt_applied: PromptApplied
    state_changed: StateChanged
    rejected: Rejected
    ended: Video
    def __init__(self, started: _Optional[_Union[Accepted, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., segment: _Optional[_Union[Segment, _Mapping]] = ..., prompt_queued: _Optional[_Union[PromptQueued, _Mapping]] = ..., prompt_applied: _Optional[_Union[PromptApplied, _Mapping]] = ..., state_changed: _Optional[_Union[StateChanged, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., ended: _Optional[_Union[Video, _Mapping]] = ...) -> None: ...

class PromptQueued(_message.Message):
    __slots__ = ("event_id", "earliest_chunk")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    EARLIEST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    event_id: str
    earliest_chunk: int
    def __init__(self, event_id: _Optional[str] = ..., earliest_chunk: _Optional[int] = ...) -> None: ...

class PromptApplied(_message.Message):
    __slots__ = ("event_id", "chunk", "completed_chunk")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_CHUNK_FIELD_NUMBER: _ClassVar[int]
    event_id: str
    chunk: int
    completed_chunk: int
    def __init__(self, event_id: _Optional[str] = ..., chunk: _Optional[int] = ..., completed_chunk: _Optional[int] = ...) -> None: ...

class StateChanged(_message.Message):
    __slots__ = ("event_id", "state")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    event_id: str
    state: State
    def __init__(self, event_id: _Optional[str] = ..., state: _Optional[_Union[State, str]] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("event_id", "error")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    event_id: str
    error: Error
    def __init__(self, event_id: _Optional[str] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("id", "created", "variant", "tasks", "frames_per_chunk", "size_multiple", "num_stages", "recommended_sizes", "max_pixels", "max_frames", "default_fps", "default_steps", "codecs", "approximations")
    ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    FRAMES_PER_CHUNK_FIELD_NUMBER: _ClassVar[int]
    SIZE_MULTIPLE_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    RECOMMENDED_SIZES_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAMES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_FPS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_STEPS_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    APPROXIMATIONS_FIELD_NUMBER: _ClassVar[int]
    id: str
    created: _timestamp_pb2.Timestamp
    variant: str
    tasks: _containers.RepeatedScalarFieldContainer[str]
    frames_per_chunk: int
    size_multiple: int
    num_stages: int
    recommended_sizes: _containers.RepeatedScalarFieldContainer[str]
    max_pixels: int
    max_frames: int
    default_fps: float
    default_steps: _containers.RepeatedScalarFieldContainer[int]
    codecs: _containers.RepeatedScalarFieldContainer[Codec]
    approximations: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., created: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., variant: _Optional[str] = ..., tasks: _Optional[_Iterable[str]] = ..., frames_per_chunk: _Optional[int] = ..., size_multiple: _Optional[int] = ..., num_stages: _Optional[int] = ..., recommended_sizes: _Optional[_Iterable[str]] = ..., max_pixels: _Optional[int] = ..., max_frames: _Optional[int] = ..., default_fps: _Optional[float] = ..., default_steps: _Optional[_Iterable[int]] = ..., codecs: _Optional[_Iterable[_Union[Codec, str]]] = ..., approximations: _Optional[_Iterable[str]] = ...) -> None: ...
