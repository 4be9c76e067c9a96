"""What can be refused without a Ray cluster is refused without one, in one line."""

import subprocess
import sys
import time

import pytest

from common.service.errors import ConfigError
from deploy import cli
from deploy.cluster.ledger import Member
from deploy.cluster.rundir import cluster_directory
from deploy.cluster.state import ClusterState
from deploy.cluster.status import render_text


@pytest.fixture(autouse=True)
def state_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def refused(capsys, *argv: str) -> str:
    assert cli.main(argv) in (1, 2)
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    return output.err.strip().removeprefix("dvd: error: ")


def lost_cluster(name: str = "one", **changes) -> ClusterState:
    """Nobody listens where its head was."""
    state = ClusterState(name, "ab12", "127.0.0.1:1", "nano", time.time(), **changes)
    state.save()
    return state


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["up"], "dvd up takes one file: dvd up cluster.yaml"),
        (["up", "/nowhere.yaml"], "/nowhere.yaml: No such file or directory"),
        (["up", "--insecur", "x"], "unknown flag --insecur; did you mean --insecure?"),
        (["status"], "no cluster was started from this machine: dvd up cluster.yaml"),
        (["status", "two"], "no cluster two was started from this machine: dvd up cluster.yaml"),
        (["scale", "vision=2"], "no cluster was started from this machine: dvd up cluster.yaml"),
        (["scale", "vison=2"], "vison=2: expected one of vision, language, routers, such as vision=3"),
        (["scale", "vision=two"], "vision=two: expected a number of servers, such as vision=3"),
        (["down"], "no cluster was started from this machine: dvd up cluster.yaml"),
    ],
)
def test_a_mistake_is_one_line(capsys, argv, expected):
    assert refused(capsys, *argv) == expected


def test_no_ray_cluster(capsys, tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("model: nano\ninsecure_network: true\n")
    assert "ray.address auto: no Ray cluster on this machine" in refused(capsys, "up", str(path))
    assert ClusterState.load("dvd") is None


def test_ray_is_not_installed(capsys, tmp_path, monkeypatch):
    path = tmp_path / "cluster.yaml"
    path.write_text("model: nano\ninsecure_network: true\n")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refused(capsys, "up", str(path)) == "dvd up needs ray: pip install 'dvd-serve[ray]'"
    path.write_text("model: nano\ninsecure_network: true\nray: {address: local}")
    assert refused(capsys, "up", str(path)) == "dvd up needs ray: pip install 'dvd-serve[ray]'"


def test_without_a_head_it_says_so(capsys):
    lost_cluster(members=[Member("vision", 0, 1, "n1", "127.0.0.2", "ready", "127.0.0.1:1")])
    assert "cannot scale: the Ray head at 127.0.0.1:1 does not answer" in refused(capsys, "scale", "vision=2")
    assert cli.main(["status"]) == 1
    shown = capsys.readouterr().out
    assert "controller lost" in shown and "the Ray head at 127.0.0.1:1 does not answer" in shown
    assert "vision-0  lost" in shown


def test_down_without_a_head_names_the_hosts_that_remain(capsys):
    lost_cluster(members=[Member("vision", 0, 1, "n1", "10.0.0.9", "ready", "10.0.0.9:9001")])
    assert cli.main(["down"]) == 1
    assert capsys.readouterr().err == "dvd down: the Ray head is lost: also run `dvd down one` on 10.0.0.9\n"
    assert ClusterState.load("one") is None


def test_down_on_a_host_that_knows_of_nothing_but_a_directory(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    directory = cluster_directory("one", "0123456789abcdef")
    other = cluster_directory("one-more", "0123456789abcdef")
    open_to_all = cluster_directory("one", "0000000000000000")
    for path, mode in ((directory, 0o700), (other, 0o700), (open_to_all, 0o755)):
        path.mkdir(mode=mode)
    (directory / "vision-0.1").mkdir()
    assert cli.main(["down", "one"]) == 0
    assert not directory.exists() and other.exists() and open_to_all.exists()


def test_a_name_is_taken(capsys, tmp_path):
    lost_cluster("dvd")
    path = tmp_path / "cluster.yaml"
    path.write_text("model: nano\ninsecure_network: true\n")
    assert "cluster dvd is up already: dvd down dvd first" in refused(capsys, "up", str(path))


def test_no_command_imports_ray(tmp_path):
    """Not even those that speak to it: a child process does."""
    source = (
        "import sys; from deploy import cli; import deploy.cluster.commands; cli.main(['up', '/nowhere.yaml']);"
        " cli.main(['status']); sys.exit(3 if 'ray' in sys.modules or 'torch' in sys.modules else 0)"
    )
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_the_table_shows_what_is_amiss():
    snapshot = {
        "name": "one",
        "model": "nano",
        "controller": {"up": True, "lost_at": None},
        "problem": "vision-1 has no place: no node has CPU 1 free",
        "waiting": [{"server": "language-0", "reason": "it ended", "retries": 2}],
        "groups": {
            "vision": {"desired": 2, "min": 1, "max": 4, "is_scaled": True},
            "language": {"desired": 1, "min": 1, "max": None, "is_scaled": False},
        },
        "servers": [
            {
                "tier": "vision",
                "server": "vision-0",
                "replica": "vision-0.1",
                "state": "ready",
                "node": "10.0.0.1",
                "address": "10.0.0.1:9001",
                "pid": 1,
                "directory": "/tmp/x",
                "queue": 12,
                "running": 4,
                "rate": 20.25,
            }
        ],
    }
    lines = render_text(snapshot).splitlines()
    assert lines[0] == "one: nano, vision 1/2 (1-4), language 0/1, router 0"
    assert lines[1:3] == [
        "vision-1 has no place: no node has CPU 1 free",
        "language-0 waits to be started again: it ended",
    ]
    assert lines[4].split() == [
        "vision-0",
        "ready",
        "10.0.0.1",
        "10.0.0.1:9001",
        "12",
        "tiles",
        "4",
        "tiles",
        "20.2",
        "tiles/s",
        "-",
    ]


def test_an_unknown_size_of_a_known_group():
    with pytest.raises(ConfigError):
        cli.COMMANDS["scale"][0](["vision=99999"])
