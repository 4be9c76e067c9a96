"""The Helm chart: Helm renders it, Kubernetes' own schemas know what comes out, and it keeps our rules."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.service import metrics
from common.service.settings import Settings
from deploy.kubernetes import values_schema
from deploy.settings import PROGRAMS
from tests.deploy.ship.tools import CHART, ROOT, VALUES, assert_clean, run

SETS = ["default", *sorted(path.stem for path in VALUES.glob("*.yaml"))]
KUBERNETES = ("1.27.0", "1.37.0")
"""The oldest that Chart.yaml allows, and the newest whose schemas we have."""
FOREIGN = {"ServiceMonitor", "ScaledObject"}
"""Kinds that are not Kubernetes' own."""
METRIC = re.compile(r"\bdvd_\w+")

Document = dict[str, Any]


def arguments(name: str) -> list[str]:
    return [] if name == "default" else ["--values", str(VALUES / f"{name}.yaml")]


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Document]]:
    found = {}
    for name in SETS:
        ran = run("helm", "template", "dvd", CHART, "--namespace", "serving", *arguments(name))
        assert ran.returncode == 0, ran.stderr
        found[name] = [document for document in yaml.safe_load_all(ran.stdout) if document]
    return found


def of_kind(documents: list[Document], kind: str) -> dict[str, Document]:
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == kind}


def pods(documents: list[Document]) -> dict[str, Document]:
    """Specs of pods, by the name of their deployment."""
    return {name: made["spec"]["template"]["spec"] for name, made in of_kind(documents, "Deployment").items()}


def container(pod: Document) -> Document:
    (only,) = pod["containers"]
    return dict(only)


def test_there_are_four_sets_of_values():
    assert len(SETS) >= 4


@pytest.mark.parametrize("name", SETS)
def test_helm_finds_no_fault(name):
    assert_clean("helm", "lint", "--strict", CHART, *arguments(name))


def test_helm_takes_the_values_of_the_docs(tmp_path):
    page = (ROOT / "docs" / "deploying.md").read_text("utf-8")
    (values,) = re.findall(r"```yaml\n(image:.*?)```", page, re.DOTALL)
    (tmp_path / "values.yaml").write_text(values.replace("sha256:...", f"sha256:{64 * 'a'}"))
    assert_clean("helm", "lint", "--strict", CHART, "--values", tmp_path / "values.yaml")


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_knows_every_field(rendered, version, tmp_path):
    files = []
    for name, documents in rendered.items():
        own = [document for document in documents if document["kind"] not in FOREIGN]
        assert len({(document["kind"], document["metadata"]["name"]) for document in documents}) == len(documents)
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump_all(own))
    assert_clean("kubernetes-validate", "--strict", "-k", version, *files)


def test_what_kubernetes_does_not_know_is_refused(tmp_path):
    """Or the test above could not fail."""
    bad = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"portz": []}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(bad))
    assert run("kubernetes-validate", "--strict", "-k", KUBERNETES[0], tmp_path / "bad.yaml").returncode != 0


def test_the_schema_is_what_the_settings_say():
    assert values_schema.FILE.read_text("utf-8") == values_schema.text(), "python -m deploy.kubernetes.values_schema"


def test_every_default_is_in_the_schema():
    """And nothing else: a value that no template reads would be a promise that nobody keeps."""
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    assert set(values) == set(values_schema.make_schema()["properties"]) - {"global"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"imagee": {}}, "imagee"),
        ({"image": {"digest": "sha256:abc"}}, "digest"),
        ({"model": {"path": "OpenGVLab/InternVL3_5-8B"}}, "path"),
        ({"keys": {"client": "a"}}, "client"),
        ({"insecureNetwork": "yes"}, "insecureNetwork"),
        ({"shutdownTimeout": 0}, "shutdownTimeout"),
        ({"router": {"options": {"max_media_item": 1}}}, "max_media_item"),
        ({"router": {"options": {"api_key": ["in the open"]}}}, "api_key"),
        ({"router": {"options": {"overload_status": "503"}}}, "overload_status"),
        ({"router": {"service": {"type": "Ingress"}}}, "type"),
        ({"vision": {"options": {"dtype": "float16"}}}, "dtype"),
        ({"vision": {"groups": {"Main": {}}}}, "Main"),
        ({"vision": {"groups": {"main": {"replica": 2}}}}, "replica"),
        ({"vision": {"autoscaling": {"waiting": 3}}}, "waiting"),
        ({"language": {"groups": {"main": {"gpus": -1}}}}, "gpus"),
        ({"language": {"resources": {"limits": {"memory": "8 GB"}}}}, "memory"),
        ({"networkPolicy": {"clients": [{}]}}, "clients"),
    ],
    ids=json.dumps,
)
def test_wrong_values_are_refused(wrong, said, tmp_path):
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    ran = run("helm", "template", "dvd", CHART, "--values", tmp_path / "wrong.yaml")
    assert ran.returncode != 0
    assert "schema" in ran.stderr
    assert said in ran.stderr


def test_keda_needs_a_prometheus():
    ran = run("helm", "template", "dvd", CHART, "--set", "vision.autoscaling.enabled=true")
    assert "prometheus.address must be set" in ran.stderr


@pytest.mark.parametrize("name", SETS)
def test_every_program_takes_its_options(rendered, name, tmp_path):
    documents = rendered[name]
    for deployment, pod in pods(documents).items():
        made = container(pod)
        program, *rest = made["args"]
        config = of_kind(documents, "ConfigMap")[deployment]["data"][f"{program}.yaml"]
        (tmp_path / "config.yaml").write_text(config)
        flags = [f"--model={word}" if not word.startswith("--") else word for word in rest]
        flags = [flag for flag in flags if not flag.startswith("--config=")]
        settings: Settings = PROGRAMS[program].load([f"--config={tmp_path / 'config.yaml'}", *flags])
        grace = pod["terminationGracePeriodSeconds"]
        wait = int(made["lifecycle"]["preStop"]["exec"]["command"][1])
        assert grace > wait + settings.model_dump()["shutdown_timeout"]


@pytest.mark.parametrize("name", SETS)
def test_pods_have_no_privileges(rendered, name):
    found = pods(rendered[name])
    assert {pod["containers"][0]["args"][0] for pod in found.values()} == set(PROGRAMS)
    for pod in found.values():
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        context = container(pod)["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        mounted = {mount["mountPath"]: mount["name"] for mount in container(pod)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(mounted.values()) == set(volumes)
        assert all("emptyDir" in volumes[mounted[path]] for path in ("/tmp", "/cache"))


@pytest.mark.parametrize("name", SETS)
def test_live_and_ready_are_asked_apart(rendered, name):
    for pod in pods(rendered[name]).values():
        made = container(pod)
        live, ready = made["livenessProbe"], made["readinessProbe"]
        if "httpGet" in live:
            assert (live["httpGet"]["path"], ready["httpGet"]["path"]) == ("/live", "/health")
        elif name == "mesh":
            assert live["grpc"] == ready["grpc"] == {"port": made["ports"][0]["containerPort"]}
        else:
            assert live["exec"]["command"] == ["python", "-m", "deploy.health", "--live"]
            assert ready["exec"]["command"] == ["python", "-m", "deploy.health"]
        assert made["startupProbe"]["failureThreshold"] > live["failureThreshold"]


def test_each_role_has_its_own_keys_only(rendered):
    for pod in pods(rendered["gpu"]).values():
        secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
        assert secrets["keys"] == f"dvd-{container(pod)['args'][0]}-keys"
    for pod in pods(rendered["mesh"]).values():
        assert [volume for volume in pod["volumes"] if "secret" in volume] == []


def test_groups_have_what_their_tier_has_but_for_what_they_say(rendered):
    made = pods(rendered["gpu"])
    limits = {name: container(pod)["resources"]["limits"] for name, pod in made.items()}
    assert limits["dvd-vision-main"] == {"memory": "8Gi", "nvidia.com/gpu": 1}
    assert limits["dvd-vision-spare"] == {"memory": "8Gi"}
    assert limits["dvd-language-main"] == {"memory": "64Gi", "nvidia.com/gpu": 2}
    assert made["dvd-vision-spare"]["nodeSelector"] == {"example.com/gpu": "l4"}
    options = of_kind(rendered["gpu"], "ConfigMap")["dvd-vision-spare"]["data"]["vision.yaml"]
    assert yaml.safe_load(options).items() >= {"threads": 8, "max_queued_tiles": 1024}.items()
    scaled = of_kind(rendered["gpu"], "Deployment")
    assert "replicas" not in scaled["dvd-vision-main"]["spec"]
    assert scaled["dvd-vision-spare"]["spec"]["replicas"] == 1
    groups = ["dvd-language-long", "dvd-language-short", "dvd-router", "dvd-vision-new", "dvd-vision-old"]
    assert sorted(pods(rendered["mesh"])) == groups


def test_routers_find_the_servers_by_name(rendered):
    for documents in rendered.values():
        services = of_kind(documents, "Service")
        options = yaml.safe_load(of_kind(documents, "ConfigMap")["dvd-router"]["data"]["router.yaml"])
        for tier in ("vision", "language"):
            (entry,) = options[tier]
            _, name, port = entry.split(":")
            assert services[name]["spec"]["clusterIP"] == "None"
            assert int(port) in {item["port"] for item in services[name]["spec"]["ports"]}


def allowed(documents: list[Document]) -> set[tuple[str, str, int]]:
    """Who may open connections to whom of us, by tier and first port, where both ends allow it."""
    policies = {
        document["metadata"]["labels"]["app.kubernetes.io/component"]: document["spec"] for document in documents
    }

    def edges(tier: str, direction: str, end: str) -> set[tuple[str, int]]:
        return {
            (peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"], port["port"])
            for rule in policies[tier][direction]
            for peer in rule[end]
            for port in rule["ports"]
            if peer.get("podSelector", {}).get("matchLabels")
        }

    leaving = {(tier, to, port) for tier in policies for to, port in edges(tier, "egress", "to")}
    arriving = {(source, tier, port) for tier in policies for source, port in edges(tier, "ingress", "from")}
    assert leaving == arriving
    return leaving


@pytest.mark.parametrize("name", ["default", "gpu", "hpa"])
def test_tiers_speak_to_each_other_as_designed_and_to_nobody_else(rendered, name):
    policies = list(of_kind(rendered[name], "NetworkPolicy").values())
    assert all(policy["spec"]["policyTypes"] == ["Ingress", "Egress"] for policy in policies)
    assert allowed(policies) == {
        ("router", "vision", 9001),
        ("router", "language", 9101),
        ("vision", "language", 9102),
    }


def test_nobody_may_scrape_unless_told(rendered):
    for name, expected in {"default": set(), "gpu": {"dvd-vision", "dvd-language"}}.items():
        policies = of_kind(rendered[name], "NetworkPolicy")
        scraped = {
            policy
            for policy, document in policies.items()
            for rule in document["spec"]["ingress"]
            if {"port": 9190} in rule["ports"]
        }
        assert scraped == expected
    assert of_kind(rendered["mesh"], "NetworkPolicy") == {}


@pytest.mark.parametrize("name", SETS)
def test_every_deployment_has_a_disruption_budget(rendered, name):
    budgets = {
        made["metadata"]["name"]: made["spec"] for made in of_kind(rendered[name], "PodDisruptionBudget").values()
    }
    for deployment, made in of_kind(rendered[name], "Deployment").items():
        assert budgets.pop(deployment)["selector"] == made["spec"]["selector"]
    assert budgets == {}


def test_scaling_follows_metrics_that_exist(rendered):
    exported = {
        f"{family._name}{'_total' if family._type == 'counter' else ''}"
        for family in vars(metrics).values()
        if hasattr(family, "describe") and hasattr(family, "_name")
    }
    keda, hpa = of_kind(rendered["gpu"], "ScaledObject"), of_kind(rendered["hpa"], "HorizontalPodAutoscaler")
    assert sorted(keda) == ["dvd-language-main", "dvd-vision-main"]
    assert sorted(hpa) == ["dvd-language-main", "dvd-router", "dvd-vision-main"]
    for found in (keda, hpa):
        asked = set(METRIC.findall(json.dumps(found)))
        assert asked == {
            *("dvd_vision_tiles_waiting", "dvd_language_kv_cache_usage_ratio", "dvd_language_requests_waiting"),
        }
        assert asked <= exported
    for name, made in {**keda, **hpa}.items():
        assert made["spec"]["scaleTargetRef"]["name"] == name


def test_monitors_select_services_and_a_port_of_theirs(rendered):
    for name in ("gpu", "mesh"):
        services = of_kind(rendered[name], "Service")
        monitors = of_kind(rendered[name], "ServiceMonitor")
        assert sorted(monitors) == ["dvd-language", "dvd-router", "dvd-vision"]
        for monitor in monitors.values():
            labels = monitor["spec"]["selector"]["matchLabels"].items()
            (service,) = [made for made in services.values() if labels <= made["metadata"]["labels"].items()]
            (endpoint,) = monitor["spec"]["endpoints"]
            assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    router = of_kind(rendered["gpu"], "ServiceMonitor")["dvd-router"]["spec"]["endpoints"][0]
    assert router["authorization"]["credentials"] == {"name": "dvd-metrics-key", "key": "key"}
    assert "authorization" not in of_kind(rendered["mesh"], "ServiceMonitor")["dvd-router"]["spec"]["endpoints"][0]


def test_the_notes_warn(tmp_path: Path):
    """Of what is open: shown by an install that goes nowhere."""
    ran = run(
        *("helm", "install", "dvd", CHART, "--dry-run=client", "--kubeconfig", tmp_path / "none"),
        *arguments("mesh"),
    )
    assert ran.returncode == 0, ran.stderr
    notes = ran.stdout.partition("NOTES:")[2]
    assert notes.count("WARNING") == 3
    assert "DvD serves flash at http://dvd-router.default.svc:8000/v1" in notes
