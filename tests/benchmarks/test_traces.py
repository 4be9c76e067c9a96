"""Three public formats are told apart by their header; a bad line is named."""

import pytest

from benchmarks.arrivals import Recorded
from benchmarks.traces import read_trace
from common.service.errors import ConfigError

BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,ChatGPT,1087,230,1317,Conversation log
50,GPT-4,300,0,300,API log
"""
SESSIONS = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,1,0.3,ChatGPT,472,18,490,Conversation log
"""
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:47.6805900,396,109
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
"""
MOONCAKE = """{"timestamp": 2500, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}

{"timestamp": 1000, "input_length": 10, "output_length": 3, "hash_ids": [46]}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BURSTGPT, [Recorded(0.0, 472, 18), Recorded(40.5, 1087, 230)]),  # the failed one is left out
        (SESSIONS, [Recorded(0.0, 472, 18)]),
        (AZURE, [Recorded(0.0, 374, 44), Recorded(1.0, 396, 109)]),
        (AZURE_2024, [Recorded(0.0, 2162, 5)]),
        (MOONCAKE, [Recorded(0.0, 10, 3), Recorded(1.5, 6955, 52)]),  # in order of time
    ],
)
def test_formats(tmp_path, text, expected):
    path = tmp_path / "trace"
    path.write_text(text)
    found = read_trace(path)
    assert [each.at for each in found] == pytest.approx([each.at for each in expected])
    assert [each[1:] for each in map(lengths, found)] == [each[1:] for each in map(lengths, expected)]


def lengths(each: Recorded) -> tuple[float, int, int]:
    return each.at, each.input_tokens, each.output_tokens


def test_a_limit_takes_the_first(tmp_path):
    path = tmp_path / "trace"
    path.write_text(BURSTGPT)
    assert len(read_trace(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (BURSTGPT.replace("1087", "many"), "line 3: bad request tokens 'many'"),
        (AZURE.replace("2023-11-16 18:15:47", "yesterday"), "line 3: bad timestamp 'yesterday.6805900'"),
        (AZURE + "2023-11-16\n", "line 4: no contexttokens"),
        (MOONCAKE.replace('"input_length": 10, ', ""), "line 3: no input_length"),
        (MOONCAKE + "{\n", "line 4: Input data was truncated"),
        (MOONCAKE + "[1]\n", "line 4: Expected `object`, got `array`"),
        (BURSTGPT.replace("45.5", "nan"), "line 3: bad timestamp 'nan'"),
        ("a,b\n1,2\n", "no known format"),
        ("", "no known format"),
        (AZURE.partition("\n")[0] + "\n", "no requests in it"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, text, complaint):
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"--trace {path}: {complaint}")
    assert "\n" not in str(caught.value)


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "nothing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="not a text file"):
        read_trace(tmp_path / "binary")
