"""Every mistake in cluster.yaml is one line that names file, key and what is allowed."""

from pathlib import Path

import pytest

from common.service.errors import ConfigError
from deploy.cluster.spec import ClusterSpec

EXAMPLE = Path(__file__).parents[3] / "deploy" / "cluster" / "example.yaml"


def load(directory: Path, text: str) -> ClusterSpec:
    path = directory / "cluster.yaml"
    path.write_text(text)
    return ClusterSpec.load(path)


def complaint(directory: Path, text: str) -> str:
    """Without the path before it."""
    with pytest.raises(ConfigError) as caught:
        load(directory, text)
    message = caught.value.message
    assert "\n" not in message
    return message.removeprefix(f"{directory / 'cluster.yaml'}: ")


def test_the_example_is_valid():
    spec = ClusterSpec.load(EXAMPLE)
    assert spec.is_scaled("vision") and not spec.is_scaled("router")


def test_a_model_is_enough(tmp_path):
    spec = load(tmp_path, "model: nano\nrouters: {host: 127.0.0.1}")
    assert [spec.group(tier).replicas for tier in ("vision", "language", "router")] == [1, 1, 1]
    assert spec.model_names == ["nano"]
    assert spec.bounds("vision") == (1, None)
    assert spec.vision.bundle == {"CPU": 1.0}
    assert load(tmp_path, "model: /models/InternVL3_5-8B\ninsecure_network: true").model_names == ["InternVL3_5-8B"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected keys and values, such as `model: nano`"),
        ("- nano", "expected keys and values, such as `model: nano`"),
        ("model: [", "not YAML: while parsing a flow node"),
        ("1: 2\nmodel: nano", "expected keys that are words"),
        ("vision: {}", "model: is required"),
        ("model: ./here", "model: expected nano, nano-flash, or a directory from the root that every node has"),
        ("model: nano\nvison: {}", "vison: unknown key; did you mean vision?"),
        ("model: nano\nvision: {max_replica: 3}", "vision.max_replica: unknown key; did you mean max_replicas?"),
        ("model: nano\nvision: 3", "vision: Input should be a valid dictionary"),
        ("model: nano\nvision: {replicas: 0}", "vision.replicas: Input should be greater than or equal to 1 (got '0')"),
        ("model: nano\nvision: {cpus: many}", "vision.cpus: Input should be a valid number"),
        (
            "model: nano\nvision: {replicas: 3, max_replicas: 2}",
            "vision.max_replicas: expected at least replicas, 3 (got '2')",
        ),
        (
            "model: nano\nlanguage: {replicas: 1, min_replicas: 2}",
            "language.min_replicas: expected at most replicas, 1 (got '2')",
        ),
        ("model: nano\nvision: {gpus: 1.5}", "vision.gpus: expected a share of one GPU, or whole GPUs (got '1.5')"),
        ("model: nano\nvision: {cpus: 0}", "vision: cpus, gpus or resources must be above 0"),
        ("model: nano\nvision: {resources: {CPU: 2}}", "vision.resources: CPU: expected a custom resource"),
        (
            "model: nano\nlanguage: {tensor_parallel_size: 2, gpus: 0.5}",
            "language.tensor_parallel_size: each rank has a GPU of its own: say gpus: 1, or 0 for ranks on CPUs",
        ),
        (
            "model: nano\nlanguage: {options: {tensor_parallel_size: 2}}",
            "language.options.tensor_parallel_size: say language.tensor_parallel_size",
        ),
        ("model: nano\nname: Mine!", "name: String should match pattern"),
        ("model: nano\nray: {address: here}", "ray.address: expected auto, local or HOST:PORT (got 'here')"),
        (
            "model: nano\ntransports: [udp]",
            "transports.0: Input should be 'auto', 'shm', 'nixl', 'tcp', 'zmq' or 'grpc' (got 'udp')",
        ),
        ("model: nano\nautoscale: {hysteresis: 1}", "autoscale.hysteresis: Input should be less than 1 (got '1')"),
        (
            "model: nano\nvision: {options: {max_batch_tile: 4}}",
            "vision.options.max_batch_tile: unknown option of dvd vision; did you mean max_batch_tiles?",
        ),
        ("model: nano\nvision: {options: {listen: x}}", "vision.options.listen: dvd up decides it"),
        ("model: nano\nrouters: {options: {port: 1}}", "routers.options.port: say routers.port"),
        ("model: nano\nvision: {options: {dtype: int}}", "vision.options.dtype: Input should be"),
        (
            "model: nano\nvision: {options: {max_queued_tiles: 3}}",
            "vision.options: max_queued_tiles must exceed max_tiles_per_image",
        ),
        ("model: nano", "api_keys: without any, everybody who reaches the routers may use them"),
        ("model: nano\nrouters: {host: 0.0.0.0}", "api_keys: without any"),
        ("model: nano\nkeys: keys", "keys: expected a directory from the root that every node has"),
        ("model: nano\nvision: {options: {keys: /k}}", "vision.options.keys: say keys"),
        ("model: nano\napi_key_file: keys", "api_key_file: "),
    ],
)
def test_a_mistake_is_named(tmp_path, text, expected):
    assert complaint(tmp_path, text).startswith(expected)


def test_ranks_become_an_option_of_their_server_and_shares_of_its_node(tmp_path):
    spec = load(tmp_path, "model: nano\ninsecure_network: true\nlanguage: {tensor_parallel_size: 4, cpus: 2, gpus: 1}")
    assert spec.options("language")["tensor_parallel_size"] == 4
    assert "tensor_parallel_size" not in spec.options("vision")
    assert spec.language.bundle == {"CPU": 8.0, "GPU": 4.0}


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"/nowhere\.yaml: No such file or directory"):
        ClusterSpec.load(Path("/nowhere.yaml"))


def test_keys_come_from_the_file_and_from_another(tmp_path):
    (tmp_path / "keys").write_text("two\nthree\n")
    spec = load(tmp_path, "model: nano\napi_keys: [first]\napi_key_file: keys")
    assert spec.options("router") == {"served_model_name": ["nano"], "api_key": ["first", "two", "three"]}
    assert "first" not in repr(spec)
    (tmp_path / "keys").write_text("\n")
    assert "empty; expected a key a line" in complaint(tmp_path, "model: nano\napi_key_file: keys")


def test_the_controller_gets_all_of_it(tmp_path):
    spec = load(tmp_path, "model: nano\napi_keys: [k]\nvision: {options: {dtype: float32}, max_replicas: 3}")
    again = ClusterSpec.from_json(spec.to_json())
    assert again == spec
    assert again.options("vision") == {
        "served_model_name": "nano",
        "transports": ["auto"],
        "dtype": "float32",
    }
