"""An announcement is whole or absent, never half."""

import os

import pytest

from common.service import announce
from common.service.errors import ConfigError


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "vision.json"
    assert announce.Announcement.read(path) is None
    announce.write(path, name="v0", role="vision", address="unix:/x", metrics_address="127.0.0.1:9")
    assert announce.Announcement.read(path) == announce.Announcement(
        "v0", "vision", "unix:/x", "127.0.0.1:9", os.getpid()
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["vision.json"]


def test_no_path_no_file():
    announce.write(None, name="v0", role="vision", address="unix:/x")


def test_a_place_that_cannot_be_written_is_the_operators_mistake(tmp_path):
    with pytest.raises(ConfigError, match="announce"):
        announce.write(tmp_path / "missing" / "x.json", name="v0", role="vision", address="unix:/x")
