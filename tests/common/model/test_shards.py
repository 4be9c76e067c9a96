"""Nothing in a safetensors header is believed; every complaint names the file and what to do."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from common.model.shards import INDEX_FILE, read_shards, tensor_names
from common.service.errors import CheckpointError
from tests.checkpoints import write_shards

TENSORS = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}


def write(path, header, data=b"", length=None):
    blob = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(blob) if length is None else length) + blob + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_entries_tell_where_the_bytes_are(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (shard,) = read_shards(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    found = {item.name: raw[item.offset : item.offset + item.num_bytes] for item in shard.entries}
    assert found == {"a": TENSORS["a"].numpy().tobytes(), "b": bytes(8)}
    assert {item.name: (item.dtype, item.shape) for item in shard.entries} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
    }
    assert shard.header_bytes == 8 + struct.unpack("<Q", raw[:8])[0]


def test_a_sharded_checkpoint(tmp_path):
    write_shards(tmp_path, TENSORS, 2)
    shards = read_shards(tmp_path)
    assert [[item.name for item in shard.entries] for shard in shards] == [["a"], ["b"]]
    assert tensor_names(tmp_path) == {"a", "b"}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "header length 0"),
        (b"{]", b"", "header is not JSON"),
        (b"[" * 100_000, b"", "header is not JSON"),
        (b"[]", b"", "not a JSON object"),
        (b'"\xff"', b"", "header is not JSON"),
        ({"a": 1}, b"", "tensor 'a' is not described"),
        ({"a": {"dtype": "F32"}}, b"", "tensor 'a' has no valid shape"),
        ({"a": entry(shape=(-1,))}, b"", "tensor 'a' has no valid shape"),
        ({"a": entry(shape=(True,))}, b"", "tensor 'a' has no valid shape"),
        ({"a": entry(offsets=(8, 0))}, bytes(8), "tensor 'a' has no valid shape"),
        ({"a": entry(dtype="F4")}, bytes(8), "tensor 'a' in shard 'model.safetensors': unsupported dtype 'F4'"),
        ({"a": entry(dtype=[])}, bytes(8), "unsupported dtype"),
        ({"a": entry(shape=(3,))}, bytes(8), r"expected 12 bytes for F32 \[3\], found 8"),
        ({"a": entry(), "b": entry()}, bytes(16), "'b' starts at byte .* expected"),
        ({"a": entry(offsets=(8, 16))}, bytes(16), "'a' starts at byte"),
        ({"a": entry()}, bytes(5), "'a' in shard 'model.safetensors' is truncated: expected 8 bytes, found 5"),
        ({"a": entry(), "b": entry(offsets=(8, 16))}, bytes(3), "'a' .* is truncated: expected 8 bytes, found 3"),
        ({"a": entry()}, bytes(9), "expected .* bytes, found"),
    ],
)
def test_corrupt_files(tmp_path, header, data, message):
    write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message):
        read_shards(tmp_path)


@pytest.mark.parametrize("length", [2**63, 10**9, 100])
def test_a_header_longer_than_its_file_is_not_read(tmp_path, length):
    write(tmp_path / "model.safetensors", b"{}", length=length)
    with pytest.raises(CheckpointError, match=f"header length {length}"):
        read_shards(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 8])
def test_a_file_too_short_for_a_header(tmp_path, size):
    (tmp_path / "model.safetensors").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match="not a sound safetensors file"):
        read_shards(tmp_path)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 10_000))
def test_any_damage_is_an_error_or_a_sound_layout(tmp_path_factory, position, value, cut):
    folder = tmp_path_factory.mktemp("damaged")
    save_file(TENSORS, folder / "model.safetensors")
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[position % len(raw)] = value
    raw = raw[: max(1, len(raw) - cut % 40)]
    (folder / "model.safetensors").write_bytes(raw)
    try:
        shards = read_shards(folder)
    except CheckpointError:
        return
    assert all(item.offset + item.num_bytes <= len(raw) for shard in shards for item in shard.entries)


class TestIndex:
    @pytest.fixture
    def sharded(self, tmp_path):
        write_shards(tmp_path, TENSORS, 2)
        return tmp_path

    def rewrite(self, path, **weight_map):
        index = json.loads((path / INDEX_FILE).read_text())
        index["weight_map"] |= weight_map
        index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard is not None}
        (path / INDEX_FILE).write_text(json.dumps(index))

    def test_names_a_missing_shard(self, sharded):
        (sharded / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(
            CheckpointError, match=r"shard 'model-00002-of-00002.safetensors' is named by .* but missing"
        ):
            read_shards(sharded)

    def test_names_a_tensor_that_is_not_there(self, sharded):
        self.rewrite(sharded, c="model-00001-of-00002.safetensors")
        with pytest.raises(
            CheckpointError, match=r"tensor 'c': .* in shard 'model-00001-of-00002.safetensors', found none"
        ):
            read_shards(sharded)

    def test_does_not_name_a_tensor_that_is_there(self, sharded):
        write_shards(sharded, TENSORS | {"c": torch.zeros(1)}, 2)
        self.rewrite(sharded, c=None)
        with pytest.raises(CheckpointError, match=r"tensor 'c': found in shard .* not expected"):
            read_shards(sharded)

    @pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b", 3, ["x"]])
    def test_points_out_of_the_folder(self, sharded, shard):
        self.rewrite(sharded, a=shard)
        with pytest.raises(CheckpointError, match="tensor 'a': expected a file name"):
            read_shards(sharded)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
    def test_is_no_index(self, sharded, text):
        (sharded / INDEX_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=INDEX_FILE):
            read_shards(sharded)


def test_other_formats_are_refused_by_name(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"'pytorch_model.bin', but only safetensors .* convert"):
        read_shards(tmp_path)


def test_an_empty_folder_and_none_at_all(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor"):
        read_shards(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint folder 'absent'"):
        read_shards(tmp_path / "absent")
