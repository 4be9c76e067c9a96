"""Dockerfile, compose files and what they mount: linters and schemas find no fault, and they keep our rules."""

import re
import subprocess
from typing import Any

import pytest
import yaml

from common.service.settings import Settings
from deploy.cluster.spec import ClusterSpec
from deploy.settings import PROGRAMS
from tests.deploy.ship.tools import CHART, ROOT, assert_clean, run

DOCKER = ROOT / "deploy" / "docker"
KUBERAY = ROOT / "deploy" / "kubernetes" / "kuberay"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (DOCKER / "Dockerfile").read_text("utf-8")
DIGEST = "sha256:" + 64 * "a"


def seconds(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"s": 1, "m": 60}[unit]


def test_the_dockerfile_is_clean():
    assert_clean("hadolint", "--failure-threshold", "style", DOCKER / "Dockerfile")


def test_hadolint_would_say_so(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp\n")
    assert run("hadolint", "--failure-threshold", "style", tmp_path / "Dockerfile").returncode != 0


def test_compose_files_are_compose_files(tmp_path):
    assert_clean(
        *("check-jsonschema", "--builtin-schema", "vendor.compose-spec"),
        *(DOCKER / "compose.yaml", DOCKER / "compose.cuda.yaml"),
    )
    (tmp_path / "bad.yaml").write_text("services: {a: {image: b, cap_dropp: [ALL]}}")
    bad = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", tmp_path / "bad.yaml")
    assert bad.returncode != 0


def test_yaml_is_tidy():
    rules = "{extends: relaxed, rules: {line-length: {max: 120}, commas: disable, truthy: enable}}"
    assert_clean("yamllint", "--strict", "-d", rules, DOCKER, KUBERAY, CHART / "Chart.yaml", CHART / "values.yaml")


@pytest.mark.parametrize(
    ("base", "unpinned", "status"),
    [
        (f"python:3.12-slim-bookworm@{DIGEST}", "refused", 0),
        ("python:3.12-slim-bookworm", "refused", 1),
        ("python:3.12-slim-bookworm@sha256:abc", "refused", 1),
        (f"python:3.12-slim-bookworm@{DIGEST[:-1]}G", "refused", 1),
        (f"python@{DIGEST}x", "refused", 1),
        ("python:3.12-slim-bookworm", "allowed", 0),
        ("python:3.12-slim-bookworm", "yes", 2),
    ],
)
def test_a_release_takes_no_base_without_a_digest(base, unpinned, status):
    ran = subprocess.run(["sh", DOCKER / "check_base.sh", base, unpinned], capture_output=True, text=True)
    assert ran.returncode == status
    assert (ran.stderr == "") == (status == 0)


def test_every_stage_stands_on_the_base_that_was_checked():
    stages = dict(re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)[::-1])
    assert "FROM ${BASE} AS base" in DOCKERFILE
    assert set(stages) == {"scratch", "${BASE}", "base", "runtime-${VARIANT}"}
    assert "ARG UNPINNED=refused" in DOCKERFILE
    assert DOCKERFILE.index("check_base.sh") < DOCKERFILE.index("pip install")


def test_the_image_runs_without_privileges():
    assert re.search(r"^USER 10001:10001$", DOCKERFILE, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK .*\"deploy.health\"\]$", DOCKERFILE, re.MULTILINE)
    assert 'ENTRYPOINT ["dvd"]' in DOCKERFILE


def test_torch_with_cuda_is_the_pinned_one():
    """By the same command as in the Dockerfile."""
    ((command, expression),) = re.findall(r"(sed '(.*)' constraints.txt)", DOCKERFILE)
    ran = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    pinned = (ROOT / "constraints.txt").read_text("utf-8")
    assert expression
    assert ran.stdout == re.sub(r"(?m)^(torch==[\d.]+)\+cpu$", r"\1", pinned)
    assert re.search(r"(?m)^torch==[\d.]+$", ran.stdout)


def test_nothing_private_gets_into_the_image():
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    wanted = {word.split("/")[0] for words in copied for word in words.split()}
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == wanted
    assert {"**/*.key", "**/*.crt"} <= set(rules)


@pytest.mark.parametrize("name", SERVICES)
def test_services_have_no_privileges(name):
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert int(service["user"].partition(":")[0]) > 0
    assert service["shm_size"]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert not service.get("privileged")
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_take_their_options_and_have_time_to_drain(name):
    service = SERVICES[name]
    words = [word for word in service["command"] if word != name]
    words = [re.sub(r"\$\{\w+:\?.*\}", "name", word) for word in words]
    flags = [f"--model={word}" if not word.startswith("--") else word for word in words]
    settings: Settings = PROGRAMS[name].load(flags)
    assert settings.model_dump()["shutdown_timeout"] < seconds(service["stop_grace_period"])
    assert service["environment"] == {"DVD_KEYS": "/keys"}
    (keys,) = [volume for volume in service["volumes"] if volume.endswith(":/keys:ro")]
    assert keys == f"${{KEYS_DIR:-./keys}}/{name}:/keys:ro"


def test_the_language_server_listens_at_its_own_address():
    """All addresses at once are refused: what is bound is what vision servers are told to dial."""
    shell, flag, script, name = SERVICES["language"]["entrypoint"]
    said = script.replace("$$", "$").replace("exec dvd", "echo")
    ran = subprocess.run([shell, flag, said, name, "/models/model"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"language /models/model --feature-listen=\S+:9102", ran.stdout.strip())


def test_servers_are_where_nobody_else_is():
    assert COMPOSE["networks"]["servers"] == {"internal": True}
    assert SERVICES["vision"]["networks"] == SERVICES["language"]["networks"] == ["servers"]
    assert SERVICES["router"]["depends_on"] == {
        tier: {"condition": "service_healthy"} for tier in ("vision", "language")
    }


def test_prometheus_asks_where_servers_answer():
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text("utf-8"))
    asked = {}
    for job in config["scrape_configs"]:
        (found,) = job["dns_sd_configs"]
        (name,) = found["names"]
        asked[name] = found["port"]
        assert ("authorization" in job) == (name == "router")
    for name, port in asked.items():
        assert any(
            word.endswith(f"{'--port=' if name == 'router' else ':'}{port}") for word in SERVICES[name]["command"]
        )
    assert set(asked) == set(PROGRAMS)


def test_what_is_mounted_exists():
    mounted = [volume.split(":")[0] for service in SERVICES.values() for volume in service["volumes"]]
    ours = [path for path in mounted if path.startswith(("./", "../"))]
    assert len(ours) == 5
    assert [path for path in ours if not (DOCKER / path).exists()] == []


def test_every_variable_is_explained():
    used = set(re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text("utf-8")))
    assert set(re.findall(r"(?m)^(\w+)=", (DOCKER / "env.example").read_text("utf-8"))) == used


# --- Ray nodes on Kubernetes


def ray_documents() -> tuple[dict[str, Any], dict[str, Any]]:
    cluster, policy = yaml.safe_load_all((KUBERAY / "raycluster.yaml").read_text("utf-8"))
    return cluster, policy


def test_ray_pods_are_what_kubernetes_knows(tmp_path):
    """Of the custom kind itself there is no schema here; what it makes are pods."""
    cluster, policy = ray_documents()
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    made = [
        {"apiVersion": "v1", "kind": "Pod", **group["template"], "metadata": {"name": f"ray-{number}"}}
        for number, group in enumerate(groups)
    ]
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump_all([*made, policy]))
    assert_clean("kubernetes-validate", "--strict", "-k", "1.37.0", tmp_path / "pods.yaml")
    for pod in made:
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        names = {mount["name"] for mount in container["volumeMounts"]}
        assert names == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_ray_takes_orders_with_a_token_and_from_its_own_nodes_only():
    cluster, policy = ray_documents()
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    head = cluster["spec"]["headGroupSpec"]["rayStartParams"]
    assert (head["dashboard-host"], head["num-cpus"], head["num-gpus"]) == ("127.0.0.1", "0", "0")
    pinned = re.search(r"(?m)^ray==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"))
    assert pinned is not None
    assert cluster["spec"]["rayVersion"] == pinned[1]
    nodes, clients = policy["spec"]["ingress"]
    assert nodes["from"] == [{"podSelector": policy["spec"]["podSelector"]}]
    assert clients["ports"] == [{"port": 8000}]


def test_dvd_up_takes_the_cluster_and_the_nodes_have_room_for_it(tmp_path):
    (tmp_path / "keys").write_text("sk-one\n")
    said = (KUBERAY / "cluster.yaml").read_text("utf-8")
    (tmp_path / "cluster.yaml").write_text(said.replace("/etc/dvd/api-keys/keys", str(tmp_path / "keys")))
    spec = ClusterSpec.load(tmp_path / "cluster.yaml")
    cluster, _ = ray_documents()
    (workers,) = cluster["spec"]["workerGroupSpecs"]
    resources = workers["template"]["spec"]["containers"][0]["resources"]
    cpus, gpus = int(resources["requests"]["cpu"]), resources["limits"]["nvidia.com/gpu"]
    wanted = [(group.replicas * group.cpus, group.replicas * group.gpus) for group in (spec.vision, spec.language)]
    assert sum(gpu for _, gpu in wanted) <= workers["replicas"] * gpus
    assert sum(cpu for cpu, _ in wanted) + spec.routers.cpus <= workers["replicas"] * cpus
    assert spec.routers.port == 8000
