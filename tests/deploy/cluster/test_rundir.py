"""What a cluster leaves on a host is private, and a process is known by more than its pid."""

import os
import subprocess
import sys

import pytest

from common.service.errors import ConfigError
from deploy.cluster.rundir import KeeperFile, birth_of, cluster_directory, end_all, keepers_in, make_private


def test_a_private_directory_may_exist_if_it_is_private(tmp_path):
    path = tmp_path / "run"
    assert make_private(path).stat().st_mode & 0o777 == 0o700
    assert make_private(path) == path
    path.chmod(0o755)
    with pytest.raises(ConfigError, match="belongs to somebody else"):
        make_private(path)


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="belongs to somebody else"):
        make_private(tmp_path / "link")


def test_a_parent_that_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory"):
        make_private(tmp_path / "a" / "b")


def test_the_directory_is_of_one_incarnation():
    assert cluster_directory("one", "ab12").name == "dvd-one-ab12"


def test_a_keeper_is_known_by_its_birth(tmp_path):
    (tmp_path / "vision-0.1").mkdir()
    born = birth_of(os.getpid())
    assert born is not None
    KeeperFile("vision", "vision-0.1", os.getpid(), born + 1, 0).write(tmp_path / "vision-0.1")
    assert keepers_in(tmp_path) == []  # a later process has its pid
    assert end_all(tmp_path, 1) == []
    assert not tmp_path.exists()


def test_what_has_ended_has_no_birth():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert birth_of(process.pid) is None


def test_a_directory_without_a_keeper_names_nobody(tmp_path):
    (tmp_path / "vision-0.1").mkdir()
    (tmp_path / "vision-1.2").mkdir()
    (tmp_path / "vision-1.2" / "keeper.json").write_text("{")
    assert keepers_in(tmp_path) == []
    assert end_all(tmp_path / "nowhere", 1) == []
