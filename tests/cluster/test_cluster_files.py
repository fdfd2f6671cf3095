"""The files that start clusters, checked by Ray's own code; and the dashboard, by our metrics."""

from __future__ import annotations

import copy
import json
import re
import shlex
import tomllib
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.aws import config as aws
from ray.autoscaler._private.kuberay import autoscaling_config as kuberay
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from imgcls.cluster.autoscaler import parse_launcher_nodes
from imgcls.cluster.session import Node
from imgcls.config import build, load
from imgcls.inference.config import PredictConfig
from imgcls.serving import proxy_middleware
from imgcls.serving.config import LimitsConfig, ServeConfig
from imgcls.serving.scaling import plan_replicas
from tests.conftest import REPOSITORY

KUBERAY = ["raycluster", "rayjob", "rayjob-pip", "rayservice"]
PAGE = (REPOSITORY / "docs" / "cluster.md").read_text()


def proxy_limits() -> dict[str, str]:
    """The environment that limits the HTTP proxies to the defaults of `imgcls serve`."""
    limits = LimitsConfig()
    return {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": proxy_middleware.CALLBACK_PATH,
        **proxy_middleware.build_environment(limits.body_bytes, limits.proxy_bytes),
    }


def prepared(text: str) -> dict[str, Any]:
    config: dict[str, Any] = prepare_config(yaml.safe_load(text))
    validate_config(config)
    return config


def test_the_aws_file_is_what_ray_takes() -> None:
    config = prepared((REPOSITORY / "cluster.yaml").read_text())
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu_spot"]["priority"] > types["gpu_on_demand"].get("priority", 0)
    assert types["gpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    workers = {name: group for name, group in types.items() if name != "head"}
    assert all(group["node_config"]["IamInstanceProfile"]["Name"] for group in workers.values())
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)


def test_aws_machines_are_reached_only_through_the_users_own_group() -> None:
    config = prepared((REPOSITORY / "cluster.yaml").read_text())
    given = copy.deepcopy(config["available_node_types"])
    assert {tuple(group["node_config"]["SecurityGroupIds"]) for group in given.values()} == {
        ("sg-00000000000000000",)
    }
    # to a group that it makes or finds by name, Ray adds SSH from everywhere
    assert "security_group" not in config["provider"]
    left = aws._configure_security_group(config)
    assert left["available_node_types"] == given
    assert aws._create_default_ssh_inbound_rules()[0]["IpRanges"] == [{"CidrIp": "0.0.0.0/0"}]
    section = PAGE.partition("\n## AWS\n")[2].partition("\n## ")[0]
    rules = re.findall(r"authorize-security-group-ingress .*?\n(?:  .*\n)?", section)
    assert len(rules) == 2
    assert all("0.0.0.0" not in rule for rule in rules)


def test_the_aws_machines_have_all_that_the_package_depends_on() -> None:
    def names(words: list[str]) -> set[str]:
        return {re.split(r"[\[<>=]", word)[0].lower() for word in words}

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    config = prepared((REPOSITORY / "cluster.yaml").read_text())
    (install,) = (line for line in config["setup_commands"] if "torch" in line)
    installed = names(shlex.split(install.partition("-constraints.txt ")[2]))
    assert installed == names(project["dependencies"])


def test_what_the_aws_machines_may_grow_to_is_read_from_the_file_as_ray_fills_it_in() -> None:
    config = prepared((REPOSITORY / "cluster.yaml").read_text())
    types = config["available_node_types"]
    types["cpu"]["resources"] = {"CPU": 16, "memory": 1}  # by AWS's own table of instance types
    for name in ("gpu_spot", "gpu_on_demand"):
        types[name]["resources"] = {"CPU": 16, "GPU": 1, "accelerator_type:L4": 1, "memory": 1}
    # machines on demand stand in for those of the spot market
    assert parse_launcher_nodes(config) == [Node(16, 1, "L4")] * 4 + [Node(16, 0)] * 8
    types["gpu_on_demand"]["priority"] = types["gpu_spot"]["priority"]
    assert parse_launcher_nodes(config) == [Node(16, 1, "L4")] * 8 + [Node(16, 0)] * 4  # 12 in all


def test_the_aws_file_names_the_versions_that_the_tests_run_with() -> None:
    text = (REPOSITORY / "cluster.yaml").read_text()
    (named,) = re.findall(r"ray\[[a-z,]+\]==([\d.]+)", text)
    assert named == ray.__version__
    constraints = (REPOSITORY / "constraints.txt").read_text()
    assert f"ray=={named}" in constraints


def test_the_file_for_ones_own_machines_is_what_ray_takes() -> None:
    (text,) = re.findall(r"```yaml\n(cluster_name.*?)```", PAGE, re.DOTALL)
    config = prepared(text)
    assert config["provider"]["worker_ips"]
    assert config["max_workers"] == len(config["provider"]["worker_ips"])


def test_every_file_for_kubernetes_is_checked() -> None:
    assert sorted(file.stem for file in (REPOSITORY / "kuberay").iterdir()) == KUBERAY


@pytest.mark.parametrize("name", KUBERAY)
def test_what_kubernetes_is_given_is_a_cluster_as_rays_autoscaler_reads_it(name: str) -> None:
    manifest = yaml.safe_load((REPOSITORY / "kuberay" / f"{name}.yaml").read_text())
    assert manifest["apiVersion"] == "ray.io/v1"
    inner = {"RayCluster": None, "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
    key = inner[manifest["kind"]]
    spec = manifest["spec"] if key is None else manifest["spec"][key]
    assert spec["rayVersion"] == ray.__version__
    cluster = {"metadata": {"name": "x", "namespace": "y"}, "spec": spec}
    config = kuberay._derive_autoscaling_config_from_ray_cr(cluster)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert types["cpu"]["resources"]["CPU"] == 16
    if name == "raycluster":
        assert types["gpu"]["resources"]["GPU"] == 1
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        # a token in the containers alone would be unknown to the autoscaler and the submitter
        env = {variable["name"]: variable["value"] for variable in container.get("env", [])}
        assert env == (proxy_limits() if name == "rayservice" else {})
    assert spec["authOptions"] == {"mode": "token"}


def test_a_job_without_an_image_installs_what_the_package_depends_on() -> None:
    job = yaml.safe_load((REPOSITORY / "kuberay" / "rayjob-pip.yaml").read_text())["spec"]
    settings = yaml.safe_load(job["runtimeEnvYAML"])
    page = (REPOSITORY / "docs" / "existing_clusters.md").read_text()
    [shown] = re.findall(r"```yaml\n(working_dir.*?)```", page, re.DOTALL)
    assert yaml.safe_load(shown) == settings | {"working_dir": "."}
    environment = RuntimeEnv(**{**settings, "pip": list(settings["pip"])})
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    named = [re.split(r"[\[<>=]", each)[0] for each in project["dependencies"]]
    pins = dict(
        line.lower().split("==")
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    expected = [f"{name}=={pins[name.lower()]}" for name in named if name != "ray"]
    assert environment.pip_config()["packages"] == expected
    assert environment.working_dir_uri().endswith(".zip")
    words = shlex.split(job["entrypoint"])
    assert words[:2] == ["python", "jobs/predict.py"]
    load(PredictConfig, words[2:])
    [image] = {
        container["image"]
        for group in (
            job["rayClusterSpec"]["headGroupSpec"],
            *job["rayClusterSpec"]["workerGroupSpecs"],
        )
        for container in group["template"]["spec"]["containers"]
    }
    assert image.startswith(f"rayproject/ray:{ray.__version__}-")


def test_the_service_on_kubernetes_has_the_settings_of_the_shipped_serve_file() -> None:
    service = yaml.safe_load((REPOSITORY / "kuberay" / "rayservice.yaml").read_text())["spec"]
    settings = yaml.safe_load(service["serveConfigV2"])
    # which a test deploys
    shipped = yaml.safe_load((REPOSITORY / "serve.yaml").read_text())
    [application], [other] = settings.pop("applications"), shipped.pop("applications")
    taken = build(ServeConfig, application.pop("args"))
    del other["args"]
    assert application == other
    shipped["http_options"]["host"] = "0.0.0.0"
    assert settings == shipped
    assert taken.keys.is_configured()
    [group] = service["rayClusterConfig"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    worker = Node(float(pod["containers"][0]["resources"]["limits"]["cpu"]), 0)
    plan = plan_replicas([worker], taken.replicas, max_nodes=[worker] * group["maxReplicas"])
    assert plan.max_replicas * plan.cpus == worker.cpus * group["maxReplicas"]
    [mount] = pod["containers"][0]["volumeMounts"]
    assert taken.keys.file == f"{mount['mountPath']}/keys.yaml"
    assert [volume["name"] for volume in pod["volumes"]] == [mount["name"]]


def test_the_dashboard_draws_metrics_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from imgcls.inference import ray_metrics

    made: dict[str, tuple[str, set[str]]] = {}

    def noted(kind: str) -> Any:
        class Metric:
            def __init__(self, name: str, *, tag_keys: tuple[str, ...], **_: Any) -> None:
                made[name] = (kind, set(tag_keys))

            def set_default_tags(self, tags: dict[str, str]) -> None: ...

        return Metric

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(ray_metrics, kind, noted(kind))
    ray_metrics.RayMetrics("a-run")
    endings = {"Counter": ["_total"], "Gauge": [""], "Histogram": ["_sum", "_count", "_bucket"]}
    exported = {
        f"ray_{name}{ending}": tags | ({"le"} if kind == "Histogram" else set())
        for name, (kind, tags) in made.items()
        for ending in endings[kind]
    }
    board = json.loads((REPOSITORY / "docs" / "grafana-dashboard.json").read_text())
    drawn = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            for metric in re.findall(r"ray_imgcls_\w+", target["expr"]):
                assert metric in exported, panel["title"]
                drawn.add(metric.removesuffix("_total"))
                tags = set(re.findall(r"by \(([\w, ]+)\)", target["expr"]))
                named = {tag for group in tags for tag in group.split(", ")}
                assert named <= exported[metric], panel["title"]
    for name, (kind, _) in made.items():
        assert f"ray_{name}" in " ".join(drawn), name
        assert f"`ray_{name}{'_total' if kind == 'Counter' else ''}`" in PAGE
