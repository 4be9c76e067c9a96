"""Options of the language server."""

from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

from common.service.program import WorkerSettings
from common.service.settings import Field
from common.transport.registry import TransportChoice
from language_server.pace import DEFAULT_STRETCH, DEFAULT_TEXT_STRETCH

QuantizationName: TypeAlias = Literal["auto", "none", "bitsandbytes", "fp8"]


class LanguageSettings(WorkerSettings):
    """The language server of DvD: prefill and decode, image features from vision servers."""

    program: ClassVar[str] = "dvd language"

    model: Path = Field(description="checkpoint directory, in InternVL or transformers format")
    served_model_name: str | None = Field(None, description="name in metrics and status; default: the directory's name")
    name: str = Field("language-0", description="name of this server, a metric label")
    listen: str = Field("127.0.0.1:9101", description="gRPC address, host:port (port 0: any free one) or unix:/path")
    feature_listen: str = Field(
        "127.0.0.1:0",
        description="where features arrive: host:port (each transport takes the next port; 0: any) or unix-dir:/path",
    )
    feature_advertise: str | None = Field(
        None,
        pattern=r"^[^\s/]+$",
        description="host that vision servers are told to dial instead of that of --feature-listen, where they reach"
        " this one by another (NAT, containers); ports stay",
    )
    transports: tuple[TransportChoice, ...] = Field(
        ("auto",), min_length=1, description="ways to take features, best first; auto: all but nixl"
    )
    encrypt_features: bool = Field(
        False,
        description="take only features sealed with AES-256-GCM, whichever way they travel; their keys come over gRPC:"
        " in clear, where that leaves the machine without TLS",
    )
    metrics_listen: str | None = Field("127.0.0.1:0", description="host:port of /metrics; null switches it off")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="of weights, arithmetic and features")
    quantization: QuantizationName = Field(
        "auto",
        description="weights of linear layers in 8 bits: bitsandbytes is LLM.int8(), fp8 has a scale a block; auto: FP8"
        " where the checkpoint is and the device multiplies it, else none",
    )
    max_model_len: int | None = Field(
        None, ge=1, description="tokens of prompt and reply; default: the model's own limit"
    )
    max_num_seqs: int = Field(64, ge=1, description="sequences in one step")
    max_num_batched_tokens: int = Field(2048, ge=1, description="tokens in one step")
    max_prefill_stretch: float = Field(
        DEFAULT_STRETCH,
        gt=1,
        description="how many times as long a step may take because prompts with images run beside sequences that"
        " generate: less keeps tokens even, more reads prompts sooner",
    )
    max_text_prefill_stretch: float = Field(
        DEFAULT_TEXT_STRETCH, gt=1, description="the same for prompts without images"
    )
    scheduling_policy: Literal["fcfs", "priority"] = Field(
        "fcfs", description="who is served first: who came first, or whose request has the smaller priority"
    )
    max_num_waiting: int = Field(256, ge=1, description="sequences admitted but not in the batch; more are refused")
    block_size: int | None = Field(
        None, ge=1, description="tokens per block of KV memory; default: as attention likes it"
    )
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        le=64,
        description="ranks that hold a share of the model each: GPUs from --device on, or processes on a CPU",
    )
    tensor_parallel_timeout: float = Field(
        120.0, gt=0, description="seconds without an answer after which a rank counts as lost, and the server ends"
    )
    kv_cache_bytes: int | None = Field(
        None, ge=1, description="KV memory of each rank; default: what suits device and model"
    )
    kv_memory_fraction: float = Field(
        0.85, gt=0, lt=1, description="share of the GPU memory left beside the weights that KV takes by default"
    )
    feature_bytes: int = Field(2**30, ge=1, description="memory for image features, those kept for reuse included")
    streamed_prefill: bool = Field(
        True, description="read a prompt up to its first missing tile while others are encoded; false: wait for all"
    )
    feature_timeout: float = Field(600.0, gt=0, description="seconds without a new tile after which a request fails")
    request_timeout: float = Field(600.0, gt=0, description="seconds for a request whose caller sets no deadline")
    max_stream_events: int = Field(1024, ge=16, description="tokens held for a slow reader before its request ends")
    cuda_graphs: bool = Field(
        True, description="on CUDA, replay steps in which sequences only generate; takes some memory, and time at start"
    )
    async_scheduling: bool = Field(True, description="with CUDA graphs, launch the next step while one runs")
    compile: bool = Field(
        False, description="torch.compile the decoder layers; the first start takes half a minute more, later ones less"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of one step; default: torch's choice")
    nice: int = Field(0, ge=0, le=19, description="OS priority; 0: before a vision server on the same cores")
    shutdown_timeout: float = Field(60.0, gt=0, description="seconds to finish admitted requests after SIGTERM")

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model.resolve().name
