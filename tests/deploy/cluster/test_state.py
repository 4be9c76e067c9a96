"""What the operator's machine remembers is private, survives, and names the cluster that a command means."""

import pytest

from common.service.errors import ConfigError
from deploy.cluster.ledger import Member
from deploy.cluster.local_head import LocalHead
from deploy.cluster.state import ClusterState, known_names, resolve_name


@pytest.fixture(autouse=True)
def state_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def state(name: str = "one", **changes) -> ClusterState:
    return ClusterState(name, "ab12", "10.0.0.1:6379", "nano", 1.0, **changes)


def test_it_comes_back_as_it_was(state_home):
    member = Member("vision", 0, 1, "n1", "10.0.0.2", "ready", "10.0.0.2:9001", "127.0.0.1:9", 7, "/tmp/x")
    saved = state(members=[member], local_head=LocalHead(12, 34, "10.0.0.1:6379"))
    saved.save()
    assert ClusterState.load("one") == saved
    (path,) = state_home.rglob("*.json")
    assert path.stat().st_mode & 0o777 == 0o600
    saved.remove()
    assert ClusterState.load("one") is None
    saved.remove()


def test_a_file_that_cannot_be_read_is_named(state_home):
    state().save()
    (path,) = state_home.rglob("*.json")
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"one\.json: cannot be read \(KeyError\); remove it"):
        ClusterState.load("one")


def test_a_command_without_a_name_means_the_only_one():
    with pytest.raises(ConfigError, match="no cluster was started from this machine"):
        resolve_name([])
    state("one").save()
    assert resolve_name([]) == "one"
    state("two").save()
    with pytest.raises(ConfigError, match="which cluster\\? name one of one, two"):
        resolve_name([])
    assert resolve_name(["two"]) == "two"
    with pytest.raises(ConfigError, match="expected one name of a cluster, found a b"):
        resolve_name(["a", "b"])
    assert known_names() == ["one", "two"]


def test_a_name_is_no_path():
    with pytest.raises(ConfigError, match=r"\.\./x: not a name of a cluster"):
        ClusterState.load("../x")
