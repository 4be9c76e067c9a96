"""``dvd serve`` takes what the three programs take, and tells each what was said and nothing else."""

import pytest

from common.service.errors import ConfigError
from deploy.settings import PLACED, PROGRAMS, ServeSettings, options_of


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_of_a_program_is_reachable(program):
    unreachable = set(PROGRAMS[program].model_fields) - set(ServeSettings.model_fields) - PLACED
    assert unreachable == set()


def test_what_serve_decides_cannot_be_said():
    own = {"config", "dump_config", "model", "served_model_name"}
    assert set(ServeSettings.model_fields) & (PLACED - own) == set()


def test_a_program_gets_what_was_said_and_keeps_its_other_defaults():
    settings = ServeSettings.load(["--model=nano", "--max-num-seqs=7", "--dtype=float32", "--transports=grpc"])
    assert options_of("language", settings) == {"max_num_seqs": 7, "dtype": "float32", "transports": ["grpc"]}
    assert options_of("vision", settings) == {"dtype": "float32", "transports": ["grpc"]}
    assert options_of("router", settings) == {}


def test_secrets_arrive_and_are_not_printed(capsys):
    arguments = ["--model=nano", "--api-key=first", "--api-key=second"]
    assert options_of("router", ServeSettings.load(arguments)) == {"api_key": ["first", "second"]}
    with pytest.raises(SystemExit):
        ServeSettings.load([*arguments, "--dump-config"])
    assert "first" not in capsys.readouterr().out


def test_flag_before_variable_before_file_before_default(tmp_path, monkeypatch):
    file = tmp_path / "dvd.yaml"
    file.write_text("model: nano\nport: 1\nmax_num_seqs: 1\nthreads: 1\nvision_cores: 0-1\n")
    monkeypatch.setenv("DVD_PORT", "2")
    monkeypatch.setenv("DVD_MAX_NUM_SEQS", "2")
    settings = ServeSettings.load(["--config", str(file), "--port", "3"])
    said = (settings.port, settings.max_num_seqs, settings.threads, settings.vision_cores, settings.max_num_waiting)
    assert said == (3, 2, 1, [0, 1], 256)


@pytest.mark.parametrize("value, cores", [("3", [3]), ("0-2", [0, 1, 2]), ("0-1,4", [0, 1, 4]), ("0,2", [0, 2])])
def test_cores(value, cores):
    assert ServeSettings.load(["--model=nano", f"--language-cores={value}"]).language_cores == cores


@pytest.mark.parametrize("value", ["a", "1-", "-1", "1--2", ""])
def test_cores_that_mean_nothing(value):
    with pytest.raises(ConfigError, match="cores"):
        ServeSettings.load(["--model=nano", f"--language-cores={value}"])


def test_clients_see_the_directory_name_unless_told_otherwise():
    assert ServeSettings(model="nano").model_names == ["nano"]
    assert ServeSettings(model="nano", served_model_name=["a", "b"]).model_names == ["a", "b"]
