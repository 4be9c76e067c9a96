"""``dvd encode``: the same file whether the model is here or on a server, numbers that are transformers' own, and
mistakes in one line that leave nothing behind."""

import asyncio
import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.service.announce import Announcement
from common.service.errors import ConfigError, InternalError, Unavailable
from deploy import cli
from deploy.encode.command import _in_order, _Item
from deploy.encode.features_file import FeaturesFile
from deploy.encode.order import Order
from deploy.encode.peer import Features
from deploy.encode.pictures import Picture, find_pictures
from deploy.encode.settings import EncodeSettings
from protos import vision_pb2_grpc
from protos.status_pb2 import ModelInfo, WorkerStatus
from protos.vision_pb2 import ExtractReply
from tests import reference
from tests.checkpoints import RandomCheckpoint, VisionShape, make_checkpoint
from tests.deploy.test_local import children_of, is_alive, private_directories
from tests.vision_server.neighbours import encoded, picture

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs/feature-extraction.md").read_text("utf-8")
# Kernels that this process compiled and those that another one finds in the cache differ in the last bit where rows are
# no multiple of 64 long: Numba optimises a parallel loop once more on its way into the cache.
VISION = VisionShape(64, 2, 4, 128, "300m")
HERE = ("--threads", "1", "--device", "cpu", "--compute-dtype", "float32")
MODEL = ModelInfo(model="tiny", image_size=448, min_dynamic_patch=1, max_dynamic_patch=12, dynamic_image_size=True)
IMAGES = {
    "square.png": picture(900, 900),  # 2 x 2 tiles, and a thumbnail
    "more/wide.png": picture(900, 450, seed=1),  # 2 x 1, and a thumbnail
    "more/square.bmp": picture(448, 448, seed=2),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, RandomCheckpoint]:
    return {
        name: make_checkpoint(
            tmp_path_factory.mktemp("models") / name, layout="github", vision=VISION, seed=5, flash=flash
        )
        for name, flash in {"base": False, "flash": True}.items()
    }


@pytest.fixture(scope="module")
def servers(checkpoints, tmp_path_factory) -> Iterator[dict[str, str]]:
    """Addresses of real vision servers, one for each checkpoint."""
    folder = tmp_path_factory.mktemp("servers")
    with contextlib.ExitStack() as stack:
        for name, checkpoint in checkpoints.items():
            arguments = ["--model", checkpoint.path, "--listen", "127.0.0.1:0", "--announce", folder / name]
            arguments += ["--threads", "1", "--device", "cpu", "--dtype", "float32", "--log-level", "error"]
            process = subprocess.Popen([sys.executable, "-m", "vision_server", *map(str, arguments)])
            stack.callback(process.wait)
            stack.callback(process.terminate)
        yield {name: address_in(folder / name) for name in checkpoints}


def address_in(path: Path) -> str:
    deadline = time.monotonic() + 100
    while (found := Announcement.read(path)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found.address


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with the three of them."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    (folder / "notes.txt").write_text("not an image")
    for name, image in IMAGES.items():
        (folder / name).write_bytes(encoded(image, "BMP" if name.endswith("bmp") else "PNG"))
    return folder


@pytest.fixture
def encode(tmp_path, capsys):
    """Runs the command; returns the file, which is there if all went well."""

    def run(*arguments: Any) -> Path:
        output = tmp_path / "features.safetensors"
        output.unlink(missing_ok=True)
        status = cli.main(["encode", *map(str, arguments), "-o", str(output)])
        said = capsys.readouterr()
        assert (status, said.out) == (0, ""), said.err
        assert re.fullmatch(rf".*{output}: \d+ images, \d+ tiles, \d+\.\d MB\n", said.err, re.DOTALL)
        return output

    return run


def metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return {name: json.loads(value) if value[0] in "[{" else value for name, value in found.items()}


def features_of(checkpoint: RandomCheckpoint, image: Any) -> torch.Tensor:
    with torch.no_grad():
        return checkpoint.reference().get_image_features(reference.pixel_values([image])).pooler_output.flatten(0, 1)


def states_of(checkpoint: RandomCheckpoint, image: Any) -> torch.Tensor:
    with torch.no_grad():
        return checkpoint.reference().model.vision_tower(reference.pixel_values([image])).last_hidden_state


# --- what is written


@pytest.mark.parametrize(
    "model, options",
    [("base", ()), ("base", ("--kind", "last_hidden_state")), ("flash", ("--dtype", "bfloat16"))],
    ids=["projected", "states", "flash"],
)
def test_both_ways_write_the_same_file(checkpoints, servers, images, encode, model, options):
    here = encode(checkpoints[model].path, images, *HERE, *options).read_bytes()
    there = encode("--server", servers[model], images, *options)
    assert there.read_bytes() == here
    assert load_file(there).keys() == {
        f"{name}.{kind}" for name in ("more/square", "more/wide", "square") for kind in ("features", "tokens_per_tile")
    }


def test_projected_features_are_those_of_transformers(checkpoints, servers, images, encode):
    tensors = load_file(encode("--server", servers["base"], images))
    for name, image in IMAGES.items():
        stem = name.partition(".")[0]
        expected = features_of(checkpoints["base"], image)
        torch.testing.assert_close(tensors[f"{stem}.features"], expected, atol=1e-5, rtol=0)
        counts = torch.full((len(expected) // 256,), 256, dtype=torch.int32)
        assert torch.equal(tensors[f"{stem}.tokens_per_tile"], counts)


def test_hidden_states_are_those_of_transformers(checkpoints, servers, images, encode):
    tensors = load_file(encode("--server", servers["base"], images / "square.png", "--kind", "last_hidden_state"))
    expected = states_of(checkpoints["base"], IMAGES["square.png"])
    assert expected.shape == (5, 1025, 64)
    torch.testing.assert_close(tensors["square.features"], expected, atol=1e-5, rtol=1e-5)
    assert tensors["square.tokens_per_tile"].tolist() == [1025] * 5


def test_bfloat16_is_half_the_file(servers, images, encode):
    exact = load_file(encode("--server", servers["base"], images))
    rounded = load_file(encode("--server", servers["base"], images, "--dtype", "bfloat16"))
    for name, tensor in exact.items():
        assert torch.equal(rounded[name], tensor if name.endswith("tokens_per_tile") else tensor.to(torch.bfloat16))


def test_a_flash_model_compresses_as_it_is_told(servers, images, encode):
    found = {}
    for mode in (["off"], ["force64"], ["auto"], ["auto", "--vir-scope", "absolute", "--vir-absolute-threshold", "0"]):
        path = encode("--server", servers["flash"], images / "square.png", "--vir-mode", *mode)
        tensors, said = load_file(path), metadata(path)["vir"]
        counts = tensors["square.tokens_per_tile"].tolist()
        assert len(tensors["square.features"]) == sum(counts)
        found[" ".join(map(str, said.values()))] = counts
    assert found.pop("auto image 0.4 0.3") not in ([256] * 5, [64] * 5)
    assert found == {"off": [256] * 5, "force64": [64] * 5, "auto absolute 0.0": [64] * 5}


def test_tiles_are_cut_as_told(servers, images, encode):
    counts = {}
    for options in ([], ["--max-dynamic-patch", 1], ["--no-thumbnail"], ["--min-dynamic-patch", 6]):
        path = encode("--server", servers["base"], images / "square.png", *options)
        (entry,) = metadata(path)["images"]
        assert len(load_file(path)["square.tokens_per_tile"]) == entry["tiles"]
        counts[" ".join(map(str, options))] = (entry["tiles"], *entry["grid"], entry["thumbnail"])
    assert counts == {
        "": (5, 2, 2, True),
        "--max-dynamic-patch 1": (1, 1, 1, False),
        "--no-thumbnail": (4, 2, 2, False),
        "--min-dynamic-patch 6": (10, 3, 3, True),
    }


def test_an_image_is_turned_only_if_told(servers, tmp_path, encode):
    exif = picture().getexif()
    exif[0x0112] = 8
    (tmp_path / "lying.png").write_bytes(encoded(picture(900, 450), exif=exif))
    sizes = []
    for options in ([], ["--exif-orientation"]):
        (entry,) = metadata(encode("--server", servers["base"], tmp_path / "lying.png", *options))["images"]
        sizes.append((entry["width"], entry["height"], *entry["grid"]))
    assert sizes == [(900, 450, 2, 1), (450, 900, 1, 2)]


def test_the_file_says_what_it_holds(servers, images, encode):
    said = metadata(encode("--server", servers["base"], images / "square.png", images))
    assert re.fullmatch("[0-9a-f]{32}", said.pop("fingerprint"))
    assert said.pop("versions").keys() == {"dvd", "format"}
    names = [entry["name"] for entry in said["images"]]
    assert names == ["square", "more/square", "more/wide", "square-2"]
    assert said.pop("images")[0] == {
        "name": "square",
        "file": str(images / "square.png"),
        "width": 900,
        "height": 900,
        "tiles": 5,
        "grid": [2, 2],
        "thumbnail": True,
    }
    tiling = {"min_dynamic_patch": 1, "max_dynamic_patch": 12, "use_thumbnail": True}
    assert said == {
        "model": "base",
        "kind": "projected",
        "dtype": "float32",
        "tiling": tiling | {"dynamic_image_size": True, "image_size": 448, "exif_orientation": False},
    }


def test_the_order_does_not_depend_on_how_many_are_under_way(servers, images, encode):
    one, many = (encode("--server", servers["base"], images, "--max-tiles-in-flight", n).read_bytes() for n in (1, 64))
    assert one == many


# --- the page about it


def block(kind: str) -> str:
    """The text of the one block that is marked so."""
    (text,) = re.findall(rf"<!-- test: {kind} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    return text


def test_the_page_is_true(servers, tmp_path, monkeypatch, capsys):
    """Its commands run, and what is shown is what they print. The server is ours, and the file elsewhere."""
    monkeypatch.chdir(ROOT)

    def ours(text: str) -> str:
        text = text.replace("features.safetensors", str(tmp_path / "features.safetensors"))
        return text.replace("127.0.0.1:9001", servers["base"])

    def dvd(line: str) -> str:
        prompt, program, *arguments = shlex.split(ours(line))
        assert (prompt, program, cli.main(arguments)) == ("$", "dvd", 0)
        return capsys.readouterr().err.strip()

    def python(text: str) -> list[str]:
        exec(compile(ours(text), "docs/feature-extraction.md", "exec"), {})
        return capsys.readouterr().out.splitlines()

    ask, shown = block("encode").splitlines()
    assert dvd(ask) == ours(shown)
    printed = python(block("load"))
    assert len(printed) == 3
    assert f"`{printed[0]}`" in PAGE
    start, ask_server = block("server").splitlines()
    assert start == "$ dvd vision nano --listen 127.0.0.1:9001"
    assert dvd(ask_server).rpartition(",")[0] == ours(shown).rpartition(",")[0]  # of another model
    (said,) = re.findall(r"  # (1 of .*)", block("grpc"))
    assert python(block("grpc")) == [said.replace("128", "56")]


# --- names and words


def test_files_are_called_by_their_stem_and_numbered_where_they_are_alike(tmp_path):
    unreadable = b"\xff.bmp".decode("utf-8", "surrogateescape")
    for name in ("a.png", "a.JPG", "a-2.png", "sub/a.webp", "sub/b.c.gif", "sub/note.txt", unreadable):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    named = [tmp_path / name for name in ("a.png", "a.JPG", "a-2.png", "sub/a.webp", "sub/note.txt")]
    assert [each.name for each in find_pictures(named)] == ["a", "a-3", "a-2", "a-4", "note"]
    below = {each.name for each in find_pictures([tmp_path])}
    assert below == {"a", "a-3", "a-2", "sub/a", "sub/b.c", "?"}


@pytest.mark.parametrize(
    "argv, flags, words",
    [
        (["m", "a.png", "-o", "x"], ["--output=x"], ["m", "a.png"]),
        (["-o=x", "m", "a.png"], ["--output=x"], ["m", "a.png"]),
        (["--server", "h:1", "a.png", "-o", "x", "b.png"], ["--server=h:1", "--output=x"], ["a.png", "b.png"]),
        (["m", "--no-thumbnail", "a.png", "--skip-bad"], ["--no-thumbnail", "--skip-bad"], ["m", "a.png"]),
        (["m", "-o", "x", "--", "-o", "-1.png"], ["--output=x"], ["m", "-o", "-1.png"]),
    ],
)
def test_words_may_stand_anywhere(argv, flags, words):
    assert cli.encode_arguments(argv) == (flags, words)


# --- what goes wrong


def mistake(capsys, tmp_path, *arguments) -> tuple[int, str]:
    """Status and the line on stderr; nothing is left of a file, and one that was there is as it was."""
    output = tmp_path / "kept.safetensors"
    output.write_text("of an earlier run")
    status = cli.main(["encode", *map(str, arguments), "--output", str(output)])
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1), said.err
    assert output.read_text() == "of an earlier run"
    assert list(tmp_path.glob(".kept*")) == []
    return status, said.err.removeprefix("dvd: error: ").strip()


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], "there is no model: dvd encode MODEL IMAGE"),
        (["nano"], "there is no image: name files, or directories"),
        (["nano", "/nowhere.png"], "/nowhere.png: no such file or directory"),
        (["nano", "x" * 300], "xxx: File name too long"),
        (["nano", "/dev/null"], "/dev/null: neither a file nor a directory"),
        (["nano", "protos"], "protos: no image in this directory; looked for .bmp, .gif"),
        (["/nowhere", "deploy/nano/images"], "model /nowhere: no such directory"),
        (["docs", "deploy/nano/images"], "model docs: no config.json"),
        (["nano", "deploy/nano/images", "--device", "tpu9"], "device 'tpu9' is unknown to torch"),
        (["nano", "deploy/nano/images", "--kind", "pooled"], "kind: Input should be 'projected'"),
        (["nano", "deploy/nano/images", "--max-dynamic-patch", "0"], "max_dynamic_patch: Input should be greater"),
        (["nano", "deploy/nano/images", "--thumbnial"], "unknown flag --thumbnial; did you mean --thumbnail?"),
        (["--server", "localhost", "deploy/nano/images"], "--server localhost: expected host:port"),
        (["--server", "a:1", "--model", "nano", "deploy"], "--model cannot be combined with --server"),
        (["--server", "a:1", "--compute-dtype", "float32", "deploy"], "--compute-dtype cannot be combined"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, tmp_path, monkeypatch, argv, expected):
    monkeypatch.chdir(ROOT)
    status, line = mistake(capsys, tmp_path, *argv)
    assert status == 2
    assert expected in line


@pytest.mark.parametrize(
    "output, expected",
    [
        ("/nowhere/x", "No such file or directory"),
        ("/", "exists and is no file"),
        ("/dev/null", "exists and is no file"),
        ("/proc/x", "No such file"),
        ("x" * 300, "File name too long"),
    ],
    ids=["nowhere", "directory", "device", "kernel", "long"],
)
def test_where_nothing_can_be_written(capsys, output, expected):
    assert cli.main(["encode", "nano", str(ROOT / "deploy/nano/images"), "-o", output]) == 2
    assert f"dvd: error: --output {output}: {expected}" in capsys.readouterr().err


def test_a_file_that_is_no_image_costs_no_model(capsys, tmp_path):
    bad = tmp_path / "letter.png"
    bad.write_text("Dear Sir or Madam")
    status, line = mistake(capsys, tmp_path, "/no/model/is/looked/for", bad)
    assert (status, line) == (1, f"{bad}: the image cannot be read: it must be JPEG, PNG, WebP, GIF or BMP")


def test_a_broken_image_is_named_or_left_out(capsys, tmp_path, servers, images, encode):
    whole = encoded(picture(900, 900, seed=5), "JPEG")
    (images / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "letter.png").write_text("Dear Sir or Madam")
    ask = ["--server", servers["base"]]
    status, line = mistake(capsys, tmp_path, *ask, images / "square.png", images / "broken.jpg")
    assert (status, line.partition(": ")[0]) == (1, str(images / "broken.jpg"))
    status, line = mistake(capsys, tmp_path, *ask, images / "letter.png")
    assert (status, line.partition(": ")[0]) == (1, str(images / "letter.png"))
    path = encode(*ask, images, "--skip-bad")
    assert [entry["name"] for entry in metadata(path)["images"]] == ["more/square", "more/wide", "square"]
    alone = load_file(encode(*ask, images / "square.png"))
    assert torch.equal(load_file(path)["square.features"], alone["square.features"])


def test_nothing_is_written_where_all_images_are_bad(capsys, tmp_path, servers, images):
    whole = encoded(picture(900, 900), "JPEG")
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.png").write_text("Dear Sir or Madam")
    output = tmp_path / "x"
    arguments = ["--server", servers["base"], str(tmp_path / "a.jpg"), str(tmp_path / "b.png"), "--skip-bad"]
    assert cli.main(["encode", *arguments, "-o", str(output)]) == 1
    *left_out, last = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in left_out] == [str(tmp_path / "b.png"), str(tmp_path / "a.jpg")]
    assert last == "dvd: error: there is no image left: none of them can be used"
    assert not output.exists()


def test_what_the_server_does_not_allow_is_its_own_word(capsys, tmp_path, servers, images):
    ask = ["--server", servers["base"], images / "square.png", "--skip-bad"]
    status, line = mistake(capsys, tmp_path, *ask, "--max-dynamic-patch", 41)
    assert (status, line) == (1, f"{images}/square.png: need 1 <= min <= max <= 40 tiles, got 1 and 41")


def test_too_many_pixels(capsys, tmp_path, images):
    status, line = mistake(capsys, tmp_path, "nano", images / "square.png", "--max-pixels", 800_000)
    assert (status, line) == (1, f"{images}/square.png: the image has 900x900 pixels, at most 800000 are accepted")


def test_a_model_without_a_vision_half(capsys, tmp_path, checkpoints, images):
    broken = shutil.copytree(checkpoints["base"].path, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("language_model")}
    save_file(kept, broken / "model.safetensors")
    status, line = mistake(capsys, tmp_path, broken, images, *HERE)
    assert status == 2
    assert re.search(r"vision tensor 'vision_model\.\S+' is missing", line)


# --- servers that are not what they should be


class Scripted(vision_pb2_grpc.VisionServicer):
    """A server that answers what it was made with: replies, or a status and our code for it."""

    def __init__(self, *answers: list[ExtractReply] | tuple[grpc.StatusCode, str]) -> None:
        self.answers = list(answers)
        self.came, self.go = threading.Event(), threading.Event()

    def WatchStatus(self, request, context):
        yield WorkerStatus(name="scripted", model=MODEL)

    def Extract(self, request, context):
        self.came.set()
        answer = self.answers.pop(0)
        if isinstance(answer, list):
            yield from answer
            self.go.wait(30 if not answer else 0)
        else:
            context.set_trailing_metadata((("dvd-code", answer[1]),))
            context.abort(answer[0], "as told")


class OfAnotherVersion(vision_pb2_grpc.VisionServicer):
    WatchStatus = Scripted.WatchStatus


@contextlib.contextmanager
def serving(servicer: vision_pb2_grpc.VisionServicer | None = None) -> Iterator[str]:
    """The address of a gRPC server, with or without a vision service."""
    server = grpc.server(ThreadPoolExecutor(4))
    if servicer is not None:
        vision_pb2_grpc.add_VisionServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        if isinstance(servicer, Scripted):
            servicer.go.set()
        server.stop(0).wait()


def reply(first_tile=0, num_tiles=1, tokens=2, hidden=2, num_bytes=16) -> ExtractReply:
    return ExtractReply(
        first_tile=first_tile,
        num_image_tiles=num_tiles,
        tokens_per_tile=[tokens],
        hidden_size=hidden,
        features=bytes(num_bytes),
    )


SMALL = ROOT / "deploy/nano/images/shape.png"


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--min-dynamic-patch", 13], "tiles of an image: at least 13 and at most 12 are asked for; the model's own"),
        (["--vir-mode", "force64"], "--vir-mode force64 needs a Flash model"),
        (["--vir-relative-threshold", 0.5], "--vir-relative-threshold needs a Flash model"),
    ],
)
def test_what_a_model_cannot_do(capsys, tmp_path, options, expected):
    with serving(Scripted()) as address:
        status, line = mistake(capsys, tmp_path, "--server", address, SMALL, *options)
    assert status == 2
    assert line.startswith(expected)


class Silent(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_nobody_and_somebody_else(capsys, tmp_path):
    status, line = mistake(capsys, tmp_path, "--server", "127.0.0.1:1", SMALL)
    assert (status, line) == (1, "no vision server answers at 127.0.0.1:1")
    with serving() as address:
        status, line = mistake(capsys, tmp_path, "--server", address, SMALL)
    assert (status, line) == (1, f"what answers at {address} is no vision server")
    with serving(OfAnotherVersion()) as address:
        status, line = mistake(capsys, tmp_path, "--server", address, SMALL)
    assert (status, line) == (1, f"{SMALL}: the server knows nothing of Extract: it is of another version")
    with HTTPServer(("127.0.0.1", 0), Silent) as web:
        threading.Thread(target=web.serve_forever).start()
        address = f"127.0.0.1:{web.server_port}"
        try:
            status, line = mistake(capsys, tmp_path, "--server", address, SMALL)
        finally:
            web.shutdown()
    assert (status, line) == (1, f"no vision server answers at {address}")


@pytest.mark.parametrize(
    "answer, expected",
    [
        ([reply(num_tiles=2)], "the server sent 1 of 2 tiles"),
        ([reply(num_tiles=2), reply(0, 2)], "do not fit together"),
        ([reply(num_tiles=2), reply(1, 2, hidden=4, num_bytes=32)], "do not fit together"),
        ([reply(num_bytes=15)], "do not fit together"),
        ([reply(tokens=0, num_bytes=0)], "do not fit together"),
        ([reply(num_tiles=2), reply(1, 2)], "1 tiles were expected and 2 came"),
        ((grpc.StatusCode.UNAVAILABLE, "draining"), "as told"),
        ((grpc.StatusCode.INTERNAL, "internal_error"), "as told"),
    ],
)
def test_a_server_that_fails_costs_the_file(capsys, tmp_path, answer, expected):
    with serving(Scripted(answer)) as address:
        status, line = mistake(capsys, tmp_path, "--server", address, SMALL, "--skip-bad")
    assert status == 1
    assert line.startswith(f"{SMALL}: ") and expected in line


def test_a_full_server_is_asked_again(monkeypatch, encode, capsys, tmp_path):
    full = (grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded")
    with serving(Scripted(full)) as address:
        status, line = mistake(capsys, tmp_path, "--server", address, SMALL, "--timeout", 0.4)
    assert (status, line) == (1, f"{SMALL}: as told")
    monkeypatch.setattr("deploy.encode.peer._PAUSE_SECONDS", 0.01)
    with serving(Scripted(full, full, [reply()])) as address:
        assert load_file(encode("--server", address, SMALL))["shape.features"].shape == (2, 2)


def test_a_server_that_takes_too_long(capsys, tmp_path):
    with serving(Scripted([])) as address:
        status, line = mistake(capsys, tmp_path, "--server", address, SMALL, "--timeout", 0.3)
    assert (status, line) == (1, f"{SMALL}: it was not encoded within 0.3 s")


# --- what is under way at once


class Counting:
    """Stands for the server: answers after a moment, the first last, and counts what is under way."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.num_tiles = self.most = self.num_cancelled = 0
        self.fail_at = fail_at

    async def extract(self, image: bytes, order: Order) -> Features:
        number, tiles = image[0], image[1]
        self.num_tiles += tiles
        self.most = max(self.most, self.num_tiles)
        try:
            await asyncio.sleep(0.03 - 0.01 * number % 3)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_tiles -= tiles
        if number == self.fail_at:
            raise Unavailable("gone")
        return Features((2,) * tiles, 2, [image])


def items_of(tmp_path: Path, tiles: list[int]) -> list[_Item]:
    """Images that are their number and their tiles, in files as in life."""
    items = []
    for number, count in enumerate(tiles):
        path = tmp_path / str(number)
        path.write_bytes(bytes([number, count]))
        items.append(_Item(Picture(path, str(number)), 448 * count, 448))
    return items


async def through(items: list[_Item], peer: Any, max_tiles: int) -> list[str]:
    order = Order.make(EncodeSettings.load(["--output=x"]), MODEL)
    return [item.picture.name async for item, _ in _in_order(items, peer, order, max_tiles)]


@pytest.mark.parametrize("max_tiles, most", [(1, 5), (6, 6), (100, 21)])
async def test_tiles_under_way_are_bounded_and_images_stay_in_order(tmp_path, max_tiles, most):
    peer = Counting()
    items = items_of(tmp_path, [1, 2, 3, 5, 1, 4, 5])
    assert await through(items, peer, max_tiles) == ["0", "1", "2", "3", "4", "5", "6"]
    assert peer.most <= most and peer.num_tiles == 0
    assert peer.most >= min(max_tiles, 5)


async def test_what_is_under_way_ends_with_the_first_failure(tmp_path):
    peer = Counting(fail_at=0)
    with pytest.raises(Unavailable, match=f"^{tmp_path}/0: gone"):
        await through(items_of(tmp_path, [1, 1, 1, 1]), peer, 100)
    assert peer.num_tiles == 0


# --- the file


def test_a_disk_that_is_full_leaves_nothing(tmp_path):
    """A limit on the size of files says the same in the same place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    refused = pytest.raises(ConfigError, match=f"--output {tmp_path}/x: File too large")
    with refused, FeaturesFile(tmp_path / "x", "float32") as file:
        file.begin(["a"], {}, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            file.add("a", [2048, 1], [bytes(8192)], [2048])
            file.finish({})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_header_that_readers_would_refuse_is_refused_first(tmp_path):
    with FeaturesFile(tmp_path / "x", "float32") as file:
        with pytest.raises(ConfigError, match=r"600 images are too many for one file: about 49\d names fit"):
            file.begin((f"{number}" + "x" * 100_000 for number in range(600)), {}, 2)
        with pytest.raises(InternalError, match=r"shape \[1, 1\] would leave what follows unaligned"):
            file.add("a", [1, 1], [bytes(2)], [1])
    assert list(tmp_path.iterdir()) == []


# --- signals, and what is imported


def command(*arguments: Any, **environ: str) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "deploy.cli", "encode", *map(str, arguments)]
    env = {**os.environ, **environ}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)


def test_ctrl_c_while_it_waits(tmp_path):
    servicer = Scripted([])
    with serving(servicer) as address:
        process = command("--server", address, SMALL, "-o", tmp_path / "x")
        assert servicer.came.wait(60)
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(signal.SIGINT)
        output, log = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert "Traceback" not in log
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_it_starts_leaves_nothing(tmp_path):
    process = command("nano", SMALL, "-o", tmp_path / "x", TMPDIR=str(tmp_path))
    deadline = time.monotonic() + 60
    while not (children := children_of(process.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, log = process.communicate(timeout=60)
    assert (process.returncode, output) == (128 + signal.SIGTERM, "")
    assert "Traceback" not in log
    while still := [pid for pid in children if is_alive(pid)]:  # the kernel ends them when their parent has ended
        assert time.monotonic() < deadline, still
        time.sleep(0.01)
    assert private_directories(tmp_path) == list(tmp_path.iterdir()) == []


def test_asking_a_server_needs_no_torch(tmp_path):
    arguments = ["encode", "--server", "127.0.0.1:1", str(SMALL), "-o", str(tmp_path / "x")]
    source = (
        f"import sys; from deploy import cli; status = cli.main({arguments});"
        "sys.exit(3 if 'torch' in sys.modules else status)"
    )
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.returncode == 1, result.stderr
