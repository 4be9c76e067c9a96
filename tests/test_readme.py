"""The README is true: its commands run, its output is what they print, its tree is the tree.

A comment ``<!-- test: KIND -->`` before a block says how: ``demo`` runs ``dvd demo`` and compares what it prints,
``parse`` checks command and options, ``client`` runs the block against a system that serves nano, ``generate`` and
``offline`` run it and compare what it prints with what follows, or with its comments.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import settings as bench_settings
from benchmarks.profile.settings import ProfileSettings
from common.service.settings import Settings
from deploy import cli, settings
from deploy.cluster import settings as cluster_settings
from deploy.cluster.spec import ClusterSpec
from deploy.encode import settings as encode_settings
from deploy.local import LocalDeployment

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
MARKED = re.compile(r"<!-- test: (?P<kind>\w+) -->\n```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)
TREE_LINE = re.compile(r"(?P<indent> *)(?P<name>\S+) +\S")
PACKAGES = ("protos", "common", "vision_server", "language_server", "router", "deploy", "dvd", "benchmarks")
TIMEOUT = 100
SETTINGS: dict[str, type[Settings]] = {
    **settings.PROGRAMS,
    "up": cluster_settings.UpSettings,
    "status": cluster_settings.StatusSettings,
    "scale": cluster_settings.ScaleSettings,
    "down": cluster_settings.DownSettings,
    "bench serve": bench_settings.BenchServeSettings,
    "bench table18": bench_settings.Table18Settings,
    "plan": bench_settings.PlanSettings,
    "profile": ProfileSettings,
    "serve": settings.ServeSettings,
    "encode": encode_settings.EncodeSettings,
    "chat": settings.ChatSettings,
    "doctor": settings.DoctorSettings,
    "demo": settings.DemoSettings,
}


def blocks(kind: str) -> list[tuple[str, str]]:
    """(language, text) of the marked blocks."""
    return [(match["language"], match["text"]) for match in MARKED.finditer(README) if match["kind"] == kind]


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line.removeprefix("$ ")) for line in text.splitlines() if line.startswith("$ ")]


def without_numbers(text: str) -> list[str]:
    """Lines with times and ports blanked; numbers inside words and the answers' own stay."""
    blanked = re.sub(r"[\d.]+(?= ms)|(?<=127\.0\.0\.1:)\d+", "#", text)
    return [line.rstrip() for line in blanked.splitlines()]


@pytest.fixture(scope="module")
def nano() -> Iterator[LocalDeployment]:
    with LocalDeployment(settings.ServeSettings(model="nano", port=0)) as deployment:
        yield deployment


def run(command: list[str], **options) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_demo_prints_what_the_readme_shows():
    ((_, text),) = blocks("demo")
    _, shown = text.split("$ make demo\n")
    assert without_numbers(run([sys.executable, "-m", "deploy.cli", "demo"])) == without_numbers(shown)


@pytest.mark.parametrize("command", [words for _, text in blocks("parse") for words in commands(text)], ids=" ".join)
def test_options_exist(command):
    program, name, *arguments = command
    assert program == "dvd"
    if name == "bench":
        name = f"bench {arguments.pop(0)}"
    declared = SETTINGS[name]
    if name == "encode":
        flags, words = cli.encode_arguments(arguments)
        assert len(words) > 1
        declared.load(flags)
        return
    flags, words = cli._split(declared, arguments)
    declared.load(cli.model_first(declared, arguments) if "model" in declared.model_fields else flags)
    assert len(words) <= 1


def test_the_cluster_is_one(tmp_path):
    ((_, text),) = blocks("cluster")
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    assert ClusterSpec.load(path).vision.max_replicas == 6


@pytest.mark.parametrize(("language", "text"), blocks("client"), ids=[language for language, _ in blocks("client")])
def test_clients_get_an_answer(nano, language, text):
    runner = {"python": [sys.executable, "-c"], "bash": ["bash", "-c"]}[language]
    environ = {**os.environ, "no_proxy": "127.0.0.1"}
    assert run([*runner, text.replace("http://127.0.0.1:8000", nano.address)], env=environ).strip()


def test_dvd_generate_prints_what_the_readme_shows():
    ((_, text),) = blocks("generate")
    shown = [line for line in text.splitlines() if not line.startswith(("$ ", "> "))]
    script = [line[2:] for line in text.splitlines() if line.startswith(("$ ", "> "))]
    dvd = f'dvd() {{ {shlex.quote(sys.executable)} -m deploy.cli "$@"; }}'
    assert run(["bash", "-euo", "pipefail", "-c", "\n".join([dvd, *script])]).splitlines() == shown


def test_python_prints_what_the_readme_says():
    ((_, text),) = blocks("offline")
    said = re.findall(r"print\(.*\)  # (.*)", text)
    assert run([sys.executable, "-c", text]).splitlines() == said


def test_make_knows_its_targets():
    targets = set(re.findall(r"(?:\$ |`)make ([a-z]+)", README))
    assert {"demo", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_the_tree_is_the_tree():
    listed = set(paths_of_tree())
    written = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*")}
    sources = {
        path
        for path in written
        if re.search(r"\.(py|proto)$", path) and not re.search(r"__init__\.py$|_pb2|/results/", path)
    }
    assert sorted(sources - listed) == []
    assert sorted(path for path in listed if not (ROOT / path).exists()) == []


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)|src=\"(?!https?:)([^\"]+)\"", README)
    assert links
    assert [link for pair in links for link in pair if link and not (ROOT / link).exists()] == []


def paths_of_tree() -> Iterator[str]:
    """Files of the annotated tree, folders left out."""
    tree = README.split("## What is where")[1].split("```")[1]
    folder = ""
    for line in tree.splitlines():
        match = TREE_LINE.match(line)
        if match is None:
            continue
        if not match["indent"]:
            folder = match["name"]
        elif not match["name"].endswith("/"):
            yield folder + match["name"]
