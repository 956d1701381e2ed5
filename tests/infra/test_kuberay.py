"""infra/kuberay: Kubernetes and KubeRay accept the manifests, and the network policies admit nothing else."""

import copy
import functools
import ipaddress
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from kustomization import Object, kustomize, render
from servers import ROOT

from pipeline import RunConfig, cli
from pipeline.predictors.classify import Classifier
from pipeline.predictors.embed import Embedder

KUBERAY = ROOT / "infra" / "kuberay"
OVERLAYS = [f"{overlay}/{part}" for overlay in ("dev", "gpu-spot") for part in ("cluster", "embed", "classify")]
KUBERNETES_VERSION = "1.32"
CRDS = Path(os.environ.get("NIGHTSHIFT_KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay"))
PLURALS = {"RayCluster": "rayclusters", "RayJob": "rayjobs"}
PREDICTORS = {"embed": Embedder, "classify": Classifier}


@functools.cache
def rendered(overlay: str) -> list[Object]:
    return kustomize(KUBERAY / "overlays" / overlay)


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [item for item in objects if item["kind"] == kind]


def ray_objects(overlay: str) -> list[Object]:
    return [item for item in copy.deepcopy(rendered(overlay)) if item["kind"] in PLURALS]


def cluster_spec(item: Object) -> Object:
    return dict(item["spec"] if item["kind"] == "RayCluster" else item["spec"]["rayClusterSpec"])


def ray_pods(item: Object) -> dict[str, Object]:
    """Pod templates of a cluster: "head", and one per worker group by its name."""
    spec = cluster_spec(item)
    return {
        "head": spec["headGroupSpec"]["template"],
        **{group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]},
    }


def pods(item: Object) -> Iterator[Object]:
    yield from ray_pods(item).values()
    if item["kind"] == "RayJob":
        yield item["spec"]["submitterPodTemplate"]


# Rendering


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_renders_to_its_object(overlay: str) -> None:
    part = overlay.partition("/")[2]
    kinds = {(item["kind"], item["metadata"]["name"]) for item in ray_objects(overlay)}
    assert kinds == ({("RayCluster", "nightshift")} if part == "cluster" else {("RayJob", part)})
    images = re.findall(r"image: (\S+)", yaml.safe_dump(rendered(overlay)))
    assert images
    assert all(re.fullmatch(r"nightshift:0\.1\.0-(cpu|cuda)", image) for image in images), images


@pytest.mark.skipif(not (shutil.which("kubectl") or shutil.which("kustomize")), reason="no kubectl to compare with")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_renderer_of_these_tests_agrees_with_kubectl(overlay: str) -> None:
    def ordered(objects: list[Object]) -> list[Object]:
        return sorted(objects, key=lambda item: (item["kind"], item["metadata"]["name"]))

    assert ordered(render(KUBERAY / "overlays" / overlay)) == ordered(rendered(overlay))


# Validation by Kubernetes and KubeRay


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_core_objects_and_pods_fit_kubernetes(overlay: str) -> None:
    core = [item for item in rendered(overlay) if item["kind"] not in PLURALS]
    assert {item["kind"] for item in core} >= {"Namespace", "ServiceAccount", "NetworkPolicy"}
    bare = [
        {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {**template.get("metadata", {}), "name": "x"}}
        for item in ray_objects(overlay)
        for template in pods(item)
    ]
    for item in [*core, *bare]:
        kubernetes_validate.validate(item, KUBERNETES_VERSION, strict=True)


@functools.cache
def crd_validator(kind: str) -> jsonschema.Draft7Validator:
    path = CRDS / f"ray.io_{PLURALS[kind]}.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's CRDs are not in {CRDS}; NIGHTSHIFT_KUBERAY_CRDS names a folder that has them")
    crd = yaml.load(path.read_text(), yaml.CSafeLoader)
    (version,) = (version for version in crd["spec"]["versions"] if version["name"] == "v1")
    return jsonschema.Draft7Validator(strict(version["schema"]["openAPIV3Schema"]))


def strict(schema: Any) -> Any:
    """The schema, with unknown fields refused. Kubernetes would drop them silently."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    opened = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not opened:
        made.setdefault("additionalProperties", False)
    return made


def fits_crd(item: Object) -> None:
    """Raise jsonschema.ValidationError unless the object fits KubeRay's CRD, which does not describe `metadata`."""
    crd_validator(item["kind"]).validate({**item, "metadata": {}})


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_objects_fit_the_crds(overlay: str) -> None:
    for item in ray_objects(overlay):
        fits_crd(item)


def test_the_crds_refuse_misspelt_fields() -> None:
    (job,) = ray_objects("dev/embed")
    job["spec"]["backOffLimit"] = 3
    with pytest.raises(jsonschema.ValidationError, match="backOffLimit"):
        fits_crd(job)


def broken_rules(item: Object) -> list[str]:
    """Rules of the operator beyond the schemas: ValidateRayJobSpec and ValidateRayClusterSpec of KubeRay 1.7."""
    broken, spec, cluster = [], item["spec"], cluster_spec(item)
    if item["kind"] == "RayJob":
        if spec.get("ttlSecondsAfterFinished", 0) and not spec.get("shutdownAfterJobFinishes"):
            broken.append("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
        if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
            broken.append("suspend needs shutdownAfterJobFinishes")
        if spec.get("clusterSelector") and spec.get("backoffLimit"):
            broken.append("backoffLimit does not go with clusterSelector")
        if spec.get("backoffLimit", 0) < 0 or spec.get("activeDeadlineSeconds", 1) <= 0:
            broken.append("backoffLimit and activeDeadlineSeconds are positive")
        if spec["submitterPodTemplate"]["spec"].get("restartPolicy") not in ("Never", "OnFailure"):
            broken.append("a Kubernetes Job restarts its pods Never or OnFailure")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", item["metadata"]["name"]):
        broken.append("the name is a DNS label of at most 47 characters")
    version = tuple(map(int, cluster.get("rayVersion", "0.0.0").split(".")))
    if cluster.get("authOptions", {}).get("mode") == "token" and version < (2, 52, 0):
        broken.append("a token needs Ray 2.52")
    grows = cluster.get("enableInTreeAutoscaling", False)
    is_v2 = grows and cluster.get("autoscalerOptions", {}).get("version") == "v2"
    if is_v2 and any(pod["spec"].get("restartPolicy", "Never") != "Never" for pod in ray_pods(item).values()):
        broken.append("restartPolicy is Never with autoscaler v2")
    for group in cluster["workerGroupSpecs"]:
        if not 0 <= group["minReplicas"] <= group["maxReplicas"]:
            broken.append("minReplicas is at most maxReplicas")
        if (group.get("priority") or group.get("idleTimeoutSeconds")) and not (is_v2 and version >= (2, 56, 0)):
            broken.append("priority and idleTimeoutSeconds need autoscaler v2 and Ray 2.56")
    return broken


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_objects_keep_the_operators_rules(overlay: str) -> None:
    for item in ray_objects(overlay):
        assert broken_rules(item) == []


def _set(path: str, value: Any) -> Callable[[Object], None]:
    def change(item: Object) -> None:
        *parents, last = path.split(".")
        for name in parents:
            item = item[int(name)] if isinstance(item, list) else item[name]
        item[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("spec.shutdownAfterJobFinishes", False), "ttlSecondsAfterFinished"),
        (_set("spec.clusterSelector", {"ray.io/cluster": "x"}), "clusterSelector"),
        (_set("spec.backoffLimit", -1), "positive"),
        (_set("spec.submitterPodTemplate.spec.restartPolicy", "Always"), "Kubernetes Job"),
        (_set("metadata.name", "Embed_1"), "DNS label"),
        (_set("spec.rayClusterSpec.rayVersion", "2.40.0"), "token"),
        (_set("spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy", "Always"), "restartPolicy"),
        (_set("spec.rayClusterSpec.workerGroupSpecs.1.minReplicas", 9), "minReplicas"),
        (_set("spec.rayClusterSpec.autoscalerOptions.version", "v1"), "autoscaler v2"),
    ],
)
def test_each_rule_can_be_broken(change: Callable[[Object], None], said: str) -> None:
    (job,) = ray_objects("gpu-spot/embed")
    change(job)
    assert said in " ".join(broken_rules(job))


# The guide


def guide() -> str:
    return (ROOT / "infra" / "README.md").read_text()


def test_the_guides_own_kustomization_is_valid(tmp_path: Path) -> None:
    """It is in the reader's folder next to infra/, and sets image, role and entry point."""
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", guide(), re.MULTILINE | re.DOTALL)
    shutil.copytree(KUBERAY, tmp_path / "infra" / "kuberay")
    (tmp_path / "tonight").mkdir()
    (tmp_path / "tonight" / "kustomization.yaml").write_text(block)
    objects = kustomize(tmp_path / "tonight")
    (job,), (account,) = of_kind(objects, "RayJob"), of_kind(objects, "ServiceAccount")
    assert set(re.findall(r"image: (\S+)", yaml.safe_dump(objects))) == {"REGISTRY/nightshift:0.1.0-cuda"}
    assert "eks.amazonaws.com/role-arn" in account["metadata"]["annotations"]
    assert broken_rules(job) == []
    most = max(group["maxReplicas"] for group in cluster_spec(job)["workerGroupSpecs"] if group["groupName"] == "gpu")
    assert RunConfig(**entrypoint(job)[1]).actor_range() == (1, most)
    fits_crd(job)


def test_the_files_that_the_guide_names_exist() -> None:
    written_by_the_reader = {"tonight/kustomization.yaml"}
    names = set(re.findall(r"`([\w./-]+(?:\.(?:yaml|sh|txt|md|py)|Dockerfile)|[\w.-]+/[\w./-]+)`", guide()))
    names = {name for name in names if not name.startswith(("/", "~", "iam.", "roles/"))} - written_by_the_reader
    assert len(names) > 10
    known = [path.relative_to(ROOT).as_posix() for folder in ("infra", "jobs") for path in (ROOT / folder).rglob("*")]
    for name in names:
        assert (ROOT / name).exists() or any(f"/{path}".endswith(f"/{name}") for path in known), name


# Requirements of the runs


def entrypoint(job: Object) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The job of a RayJob, the flags of its run, and the flags of its predictor."""
    python, script, *arguments = job["spec"]["entrypoint"].split()
    assert (python, (ROOT / script).is_file()) == ("python", True)
    return Path(script).stem, *cli.parse(PREDICTORS[Path(script).stem], "", arguments)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_version_is_that_of_the_packages(overlay: str) -> None:
    for item in ray_objects(overlay):
        assert cluster_spec(item)["rayVersion"] == ray.__version__


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if not name.endswith("cluster")])
def test_a_job_resumes_by_its_output(overlay: str) -> None:
    """The entry point is a valid command whose output is in a bucket, so that every attempt continues from it."""
    (job,) = ray_objects(overlay)
    name, run_values, predictor_values = entrypoint(job)
    PREDICTORS[name](**predictor_values)
    config = RunConfig(**run_values)
    assert config.output.startswith("s3://")
    assert not config.overwrite, "every attempt would start from scratch"
    assert job["spec"]["backoffLimit"] >= 1
    assert job["spec"]["submitterConfig"]["backoffLimit"] >= 20, "in a night on spot more than one submitter is lost"
    assert job["spec"]["activeDeadlineSeconds"] >= 7 * 24 * 3600, "an attempt that takes longer is not retried"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_head_does_no_work_and_is_not_evicted(overlay: str) -> None:
    for item in ray_objects(overlay):
        head = cluster_spec(item)["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        kept = [head["template"], *([item["spec"]["submitterPodTemplate"]] if item["kind"] == "RayJob" else [])]
        for template in kept:
            assert template["metadata"]["annotations"] == {
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
                "karpenter.sh/do-not-disrupt": "true",
            }
        waits = {each["key"]: each["tolerationSeconds"] for each in head["template"]["spec"]["tolerations"]}
        assert waits == {"node.kubernetes.io/not-ready": 60, "node.kubernetes.io/unreachable": 60}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_head_of_a_run_is_not_drained_and_that_of_a_standing_cluster_may_be(overlay: str) -> None:
    budgets = of_kind(rendered(overlay), "PodDisruptionBudget")
    if overlay.endswith("cluster"):
        assert budgets == []
        return
    (budget,) = budgets
    assert budget["metadata"]["namespace"] == "nightshift"
    assert budget["spec"]["minAvailable"] > len(ray_objects(overlay))
    assert budget["spec"]["selector"]["matchLabels"].items() <= HEAD.items()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_node_has_probes_resources_and_time_to_stop(overlay: str) -> None:
    for item in ray_objects(overlay):
        for pod in ray_pods(item).values():
            (container,) = pod["spec"]["containers"]
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
            grace = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
            assert grace < pod["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name.startswith("gpu-spot")])
def test_spot_workers_come_from_none_and_the_head_stays_off_spot(overlay: str) -> None:
    (item,) = ray_objects(overlay)
    spec = cluster_spec(item)
    decode, gpu = spec["workerGroupSpecs"]
    assert (decode["groupName"], decode["minReplicas"], decode["maxReplicas"] > 1) == ("decode", 0, True)
    assert (gpu["groupName"], gpu["minReplicas"], gpu["maxReplicas"] > 1) == ("gpu", 0, True)
    assert decode["priority"] > gpu["priority"], "no GPU is started for decoding"
    (container,) = gpu["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in gpu["template"]["spec"][
        "tolerations"
    ]

    def terms(pod: Object) -> list[Object]:
        affinity = pod["spec"]["affinity"]["nodeAffinity"]
        return list(affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"])

    spot = {(e["key"], e["values"][0]) for term in terms(gpu["template"]) for e in term["matchExpressions"]}
    (head,) = terms(spec["headGroupSpec"]["template"])
    assert {e["operator"] for e in head["matchExpressions"]} == {"NotIn"}
    assert {(e["key"], e["values"][0]) for e in head["matchExpressions"]} == spot
    if item["kind"] == "RayJob":
        assert terms(item["spec"]["submitterPodTemplate"]) == [head]
    (priority,) = of_kind(rendered(overlay), "PriorityClass")
    assert 0 > priority["value"] >= -10, "for pods below -10 the cluster autoscaler starts no machine"
    assert gpu["template"]["spec"]["priorityClassName"] == priority["metadata"]["name"]


def test_the_trial_cluster_fits_one_node() -> None:
    (cluster,) = ray_objects("dev/cluster")
    cpus = [float(pod["spec"]["containers"][0]["resources"]["limits"]["cpu"]) for pod in ray_pods(cluster).values()]
    assert sum(cpus) <= 3.5, "a node of 4 CPUs has Kubernetes' own pods and the submitter on it"


# Network access


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_restricted(overlay: str) -> None:
    """The `restricted` pod security standard, which the namespace enforces, and a read-only root."""
    (namespace,) = of_kind(rendered(overlay), "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for item in ray_objects(overlay):
        contexts = [pod["spec"]["containers"][0]["securityContext"] for pod in pods(item)]
        if autoscaler := cluster_spec(item).get("autoscalerOptions"):
            contexts.append(autoscaler["securityContext"])
        for context in contexts:
            assert context == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        for pod in pods(item):
            security = pod["spec"]["securityContext"]
            assert security["runAsNonRoot"] is True
            assert security["runAsUser"] > 0
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            written = {mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
            assert written == {"/tmp", "/home/nightshift"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_autoscaler_holds_a_kubernetes_token(overlay: str) -> None:
    (account,) = of_kind(rendered(overlay), "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    for item in ray_objects(overlay):
        spec = cluster_spec(item)
        assert spec["authOptions"] == {"mode": "token"}
        for pod in pods(item):
            assert pod["spec"]["automountServiceAccountToken"] is False
            assert pod["spec"]["serviceAccountName"] == account["metadata"]["name"]
            assert not any(m["name"] == "kubernetes-token" for m in pod["spec"]["containers"][0]["volumeMounts"])
        mounts = spec.get("autoscalerOptions", {}).get("volumeMounts", [])
        assert bool(mounts) == spec.get("enableInTreeAutoscaling", False)
        assert {mount["name"] for mount in mounts} <= {v["name"] for v in ray_pods(item)["head"]["spec"]["volumes"]}


NODE = {"app.kubernetes.io/part-of": "nightshift", "app.kubernetes.io/component": "node"}
HEAD = {**NODE, "ray.io/node-type": "head"}
WORKER = {**NODE, "ray.io/node-type": "worker"}
SUBMITTER = {"app.kubernetes.io/part-of": "nightshift", "app.kubernetes.io/component": "submitter"}
OPERATOR = {"app.kubernetes.io/component": "kuberay-operator"}


def lets_in(policies: list[Object], to: Object, port: int, labels: Object, namespace: str = "nightshift") -> bool:
    """True if the policies of namespace `nightshift` let a pod with `labels` reach a port of pod `to`."""

    def selects(selector: Object, labels: Object) -> bool:
        return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())

    def is_peer(peer: Object) -> bool:
        if "namespaceSelector" in peer:
            inside = selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
        else:
            inside = namespace == "nightshift"
        return inside and selects(peer.get("podSelector", {}), labels)

    chosen = [policy["spec"] for policy in policies if selects(policy["spec"]["podSelector"], to)]
    if not any("Ingress" in spec["policyTypes"] for spec in chosen):
        return True
    return any(
        any(is_peer(peer) for peer in rule["from"]) and port in {p["port"] for p in rule.get("ports", [{"port": port}])}
        for spec in chosen
        for rule in spec.get("ingress", [])
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_dashboard_is_closed_to_all_but_submitters_and_the_operator(overlay: str) -> None:
    policies = of_kind(rendered(overlay), "NetworkPolicy")
    for item in ray_objects(overlay):
        for name, pod in ray_pods(item).items():
            labels = {**pod["metadata"]["labels"], "ray.io/node-type": "head" if name == "head" else "worker"}
            assert labels == (HEAD if name == "head" else WORKER)
        if item["kind"] == "RayJob":
            assert item["spec"]["submitterPodTemplate"]["metadata"]["labels"] == SUBMITTER
    reach = functools.partial(lets_in, policies)
    assert reach(HEAD, 8265, SUBMITTER)
    assert reach(HEAD, 8265, OPERATOR, "kuberay-operator")
    assert reach(HEAD, 6379, WORKER)
    assert reach(WORKER, 10002, HEAD)
    assert not reach(HEAD, 8265, OPERATOR, "default"), "the label alone gives no access"
    assert not reach(HEAD, 8265, {"app": "notebook"})
    assert not reach(HEAD, 8265, NODE, "default")
    assert not reach(HEAD, 6379, SUBMITTER)
    assert not reach(HEAD, 10001, OPERATOR, "kuberay-operator")
    assert not reach(WORKER, 8265, {"app": "notebook"})


def lets_out(policies: list[Object], address: str, port: int, protocol: str = "TCP") -> bool:
    """True if the policies let a node of Ray reach a port outside the cluster's pods."""

    def is_in(block: Object) -> bool:
        target = ipaddress.ip_address(address)
        inside, *outside = (ipaddress.ip_network(each) for each in (block["cidr"], *block.get("except", [])))
        return target in inside and not any(target in each for each in outside)

    return any(
        ("to" not in rule or any("ipBlock" in peer and is_in(peer["ipBlock"]) for peer in rule["to"]))
        and ("ports" not in rule or {"protocol": protocol, "port": port} in rule["ports"])
        for policy in policies
        for rule in policy["spec"].get("egress", [])
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_cannot_reach_the_metadata_of_the_machine(overlay: str) -> None:
    reach = functools.partial(lets_out, of_kind(rendered(overlay), "NetworkPolicy"))
    for metadata in ("169.254.169.254", "169.254.169.252", "169.254.170.2", "fd00:ec2::254", "fe80::a9fe:a9fe"):
        assert not any(reach(metadata, port) for port in (80, 443, 988, 8080)), metadata
    assert reach("203.0.113.1", 443)
    assert not reach("203.0.113.1", 80)
    assert reach("169.254.170.23", 80), "EKS Pod Identity"


@pytest.mark.parametrize(
    "resolver",
    [
        pytest.param("10.96.0.10", id="kube-dns by its service address, also if a cache on the machine answers"),
        pytest.param("169.254.20.10", id="NodeLocal DNSCache"),
        pytest.param("169.254.169.254", id="Cloud DNS on GKE"),
    ],
)
def test_pods_can_resolve_names(resolver: str) -> None:
    policies = of_kind(rendered("dev/cluster"), "NetworkPolicy")
    assert lets_out(policies, resolver, 53, "UDP")
    assert lets_out(policies, resolver, 53)
