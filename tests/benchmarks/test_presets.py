"""Options become the plan that their help promises; what does not go together is refused in one line, by flag."""

import math

import pytest

from benchmarks.arrivals import ClosedLoop, OpenLoop, Ramp, Replay
from benchmarks.plan import Plan
from benchmarks.presets import goodput_limits, make_plan, percentiles
from benchmarks.settings import BenchServeSettings
from benchmarks.workload import Lengths, Size, fixed
from common.service.errors import ConfigError

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:47.68,396,109\n"
RAMP = ["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "1", "--ramp-up-end-rps", "3"]


def plan(*argv: str) -> Plan:
    return make_plan(BenchServeSettings.load(argv))


def only_source(*argv: str):
    (phase,) = plan(*argv).phases
    (source,) = phase.sources
    return source


def test_the_default():
    source = only_source()
    assert (source.arrivals, source.num_requests) == (ClosedLoop(8), 100)
    assert source.workload.image_sizes == ((Size(448, 448), 1.0),)
    assert source.workload.images_per_request == fixed(1)
    assert source.workload.options == {"temperature": 0.0}


@pytest.mark.parametrize(
    ("argv", "arrivals"),
    [
        (["--concurrency", "3"], ClosedLoop(3)),
        (["--request-rate", "5", "--burstiness", "0.5", "--max-concurrency", "9"], OpenLoop(5.0, 0.5, 9)),
        (["--request-rate", "inf"], OpenLoop(math.inf)),
        ([*RAMP, "--duration", "9"], Ramp("linear", 1.0, 3.0, 9.0)),
        ([*RAMP, "--num-prompts", "40"], Ramp("linear", 1.0, 3.0, 20.0)),
    ],
)
def test_loads(argv, arrivals):
    assert only_source(*argv).arrivals == arrivals


def test_a_trace_is_text_unless_images_are_asked_for(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    source = only_source("--trace", str(path), "--trace-speed", "2", "--trace-limit", "1")
    assert isinstance(source.arrivals, Replay)
    assert (len(source.arrivals.requests), source.arrivals.speed, source.num_requests) == (1, 2.0, None)
    assert source.workload.images_per_request == fixed(0)
    assert source.asks == "text only, lengths as recorded"
    assert only_source("--trace", str(path), "--images-per-request", "2").workload.images_per_request == fixed(2)


def test_the_end():
    assert only_source("--duration", "5").num_requests is None
    assert plan("--duration", "5", "--warmup", "2").phases[0].duration == 5
    assert plan("--duration", "5", "--warmup", "2").phases[0].warmup == 2


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1344", ((Size(1344, 1344), 1.0),)),
        ("1080p", ((Size(1920, 1080), 1.0),)),
        ("640x480", ((Size(640, 480), 1.0),)),
        ("448:0.5,896:0.3,1080p:0.2", ((Size(448, 448), 0.5), (Size(896, 896), 0.3), (Size(1920, 1080), 0.2))),
        ("mixed", ((Size(448, 448), 0.5), (Size(896, 896), 0.3), (Size(1920, 1080), 0.2))),
        ("448, 896", ((Size(448, 448), 1.0), (Size(896, 896), 1.0))),
    ],
)
def test_sizes(text, sizes):
    assert only_source("--image-size", text).workload.image_sizes == sizes


def test_lengths_and_further_fields():
    argv = ["--input-tokens", "10-20", "--output-tokens", "5", "--images-per-request", "0-3"]
    workload = only_source(*argv, "--extra-body", '{"top_k": 1}', "--temperature", "0.5").workload
    assert (workload.input_tokens, workload.output_tokens) == (Lengths(10, 20), Lengths(5, 5))
    assert workload.images_per_request == Lengths(0, 3)
    assert workload.options == {"temperature": 0.5, "top_k": 1}


def test_limits_of_goodput():
    settings = BenchServeSettings.load(["--goodput", "ttft:500,tpot:50.5", "--goodput", "e2el:1000"])
    assert goodput_limits(settings) == {"ttft": 500, "tpot": 50.5, "e2el": 1000}
    assert goodput_limits(BenchServeSettings.load([])) == {}


def test_every_run_has_a_salt_of_its_own_unless_told():
    assert plan().salt != plan().salt
    assert plan("--salt", "5").salt == plan("--salt", "5", "--preset", "reuse").salt == 5


def test_percentiles():
    assert percentiles(BenchServeSettings.load(["--metric-percentiles", "25,99.9"])) == [25, 99.9]


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ("--concurrency 2 --request-rate 3", "--request-rate: cannot be combined with --concurrency"),
        ("--request-rate 3 --trace x", "--trace: cannot be combined with --request-rate"),
        ("--duration 3 --num-prompts 3", "--duration: cannot be combined with --num-prompts"),
        ("--request-rate inf --duration 3", "--duration: all at once"),
        ("--max-concurrency 3", "--max-concurrency: only with an open loop"),
        ("--concurrency 2 --max-concurrency 3", "--max-concurrency: only with an open loop"),
        ("--burstiness 2", "--burstiness: only with --request-rate"),
        ("--trace-limit 2", "--trace-limit: only with --trace"),
        ("--ramp-up-end-rps 2", "--ramp-up-end-rps: only with --ramp-up-strategy"),
        ("--ramp-up-strategy linear --ramp-up-end-rps 2", "--ramp-up-start-rps: --ramp-up-strategy needs it"),
        ("--trace x --num-prompts 3", "--num-prompts: the trace decides it"),
        ("--trace x --output-tokens 3", "--output-tokens: the trace decides it"),
        ("--trace /nowhere", "--trace /nowhere: No such file or directory"),
        ("--image-size huge", "--image-size huge: expected"),
        ("--image-size 0", "--image-size 0: expected"),
        ("--image-size 448:0", "--image-size 448:0: expected"),
        ("--image-size 448:x", "--image-size 448:x: expected"),
        ("--image-size 99999x1", "--image-size 99999x1: expected"),
        ("--input-tokens 0", "--input-tokens 0: expected N or LOW-HIGH, at least 1"),
        ("--output-tokens 5-2", "--output-tokens 5-2: expected N or LOW-HIGH"),
        ("--images-per-request few", "--images-per-request few: expected N or LOW-HIGH"),
        ("--extra-body [1]", "--extra-body: expected a JSON object"),
        ("--preset reuse --image-reuse-ratio 0.5", "--image-reuse-ratio: decided by --preset reuse"),
        ("--preset internvl --image-size 448", "--image-size: decided by --preset internvl"),
        ("--preset text-beside-images --concurrency 2", "--concurrency: decided by --preset text-beside-images"),
        ("--preset nothing", "preset: Input should be 'internvl', 'reuse', 'text-beside-images' or 'language'"),
        ("--image-reuse-ratio 2", "image_reuse_ratio: Input should be less than or equal to 1"),
        ("--request-rat 2", "unknown flag --request-rat; did you mean --request-rate?"),
    ],
)
def test_what_is_refused(argv, complaint):
    with pytest.raises(ConfigError) as caught:
        plan(*argv.split())
    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", ["ttft", "ttft:", "ttft:-1", "ttft:inf", "speed:3"])
def test_no_limit_of_goodput(limit):
    with pytest.raises(ConfigError, match=f"--goodput {limit}: expected ttft:MS"):
        goodput_limits(BenchServeSettings.load(["--goodput", limit]))


def test_no_percentile():
    with pytest.raises(ConfigError, match="--metric-percentiles 101: expected numbers from 0 to 100"):
        percentiles(BenchServeSettings.load(["--metric-percentiles", "50,101"]))


def test_the_sizes_of_the_report_under_any_load():
    found = plan("--preset", "internvl", "--request-rate", "16", "--duration", "60", "--images-per-request", "2")
    assert [phase.name for phase in found.phases] == ["448 px", "896 px", "1344 px"]
    for phase, side in zip(found.phases, (448, 896, 1344), strict=True):
        (source,) = phase.sources
        assert (source.arrivals, phase.duration) == (OpenLoop(16.0), 60)
        assert source.workload.image_sizes == ((Size(side, side), 1.0),)
        assert source.workload.ignore_eos and source.workload.images_per_request == fixed(2)


def test_reuse():
    found = plan("--preset", "reuse", "--num-prompts", "10")
    assert [phase.sources[0].workload.image_reuse_ratio for phase in found.phases] == [0, 0.5, 0.9]
    assert {(phase.duration, phase.sources[0].num_requests) for phase in found.phases} == {(None, 10)}
    assert {phase.duration for phase in plan("--preset", "reuse").phases} == {30.0}


def test_language():
    found = plan("--preset", "language")
    assert [(phase.name, phase.sources[0].arrivals) for phase in found.phases] == [
        ("text", ClosedLoop(16)),
        ("text and images", ClosedLoop(16)),
    ]
    workloads = [phase.sources[0].workload for phase in found.phases]
    assert [workload.text_only_share for workload in workloads] == [1.0, 0.5]
    assert {(w.input_tokens, w.output_tokens, w.ignore_eos) for w in workloads} == {(fixed(256), fixed(64), True)}


def test_text_beside_images():
    found = plan("--preset", "text-beside-images", "--warmup", "1")
    assert [[source.name for source in phase.sources] for phase in found.phases] == [
        ["text"],
        ["images"],
        ["text", "images"],
    ]
    text, images, both = found.phases
    assert both.sources == (*text.sources, *images.sources)
    assert (text.sources[0].arrivals, images.sources[0].arrivals) == (ClosedLoop(4), ClosedLoop(2))
    assert found.compared == (text.name, images.name, both.name)
    assert {phase.duration for phase in found.phases} == {30.0}
    assert {phase.warmup for phase in found.phases} == {1.0}
