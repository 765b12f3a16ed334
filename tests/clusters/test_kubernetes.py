"""Manifests for what they must contain; starting, through dask-kubernetes itself and an API in this process."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from curator_embed import get_client
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.errors import CuratorEmbedError, MissingExtra, UsageError
from curator_embed.execution.clusters import read_cluster
from curator_embed.execution.clusters.kubernetes import KubernetesConfig, memory_bytes, pod_problem
from curator_embed.execution.workers import cores_per_worker
from tests.clusters.kubernetes_api import Kubernetes, serving
from tests.conftest import REPO
from tests.shards import write_dataset
from tests.stub import WaitingEmbedder

FULL: dict[str, Any] = {
    "image": "registry/embed:1", "name": "embed-7", "namespace": "vision", "nodes": 3, "gpus_per_node": 4,
    "cpu": 32, "memory": "256Gi", "threads_per_worker": 3, "env": {"AWS_REGION": "eu-west-1"},
    "secret_env": {"HF_TOKEN": "hugging-face/token"}, "secrets": ["aws"], "service_account": "embedder",
    "image_pull_secrets": ["registry"], "node_selector": {"node.kubernetes.io/instance-type": "p4d.24xlarge"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "pod": {"volumes": [{"name": "weights", "persistentVolumeClaim": {"claimName": "weights"}}]},
    "container": {"volumeMounts": [{"name": "weights", "mountPath": "/weights"}]},
    "worker_args": ["--rmm-pool-size", "0.2"], "idle_timeout": 900,
    "owner": {"apiVersion": "v1", "kind": "Pod", "name": "embed-7", "uid": "0d2c"},
}  # fmt: skip


def worker_of(manifest: dict[str, Any]) -> dict[str, Any]:
    [container] = manifest["spec"]["worker"]["spec"]["containers"]
    return container


def scheduler_of(manifest: dict[str, Any]) -> dict[str, Any]:
    [container] = manifest["spec"]["scheduler"]["spec"]["containers"]
    return container


def test_gpu_pods_run_dask_cuda_which_starts_one_worker_for_each_gpu_of_the_limit() -> None:
    worker = worker_of(KubernetesConfig(**FULL).manifest())
    assert worker["args"][:3] == ["dask", "cuda", "worker"]
    assert "--nworkers" not in worker["args"]  # dask cuda worker counts the GPUs it sees
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert worker["args"][-2:] == ["--rmm-pool-size", "0.2"]


def test_pods_without_gpus_run_as_many_workers_as_asked_for() -> None:
    worker = worker_of(KubernetesConfig(image="i", workers_per_node=3, memory="12Gi").manifest())
    assert worker["args"][:4] == ["dask", "worker", "--nworkers", "3"]
    assert not any("gpu" in name for name in worker["resources"]["limits"])


@pytest.mark.parametrize("settings", [FULL, {"image": "i"}], ids=["gpu", "cpu"])
def test_requests_equal_limits_and_memory_is_shared_by_a_pods_workers(settings: dict[str, Any]) -> None:
    config = KubernetesConfig(**settings)
    for container in (worker_of(config.manifest()), scheduler_of(config.manifest())):
        assert container["resources"]["requests"] == container["resources"]["limits"]
    args = worker_of(config.manifest())["args"]
    workers = config.gpus_per_node or config.workers_per_node
    assert int(args[args.index("--memory-limit") + 1]) * workers == memory_bytes(config.memory)
    assert args[args.index("--nthreads") + 1] == str(config.threads_per_worker)
    assert args[args.index("--name") + 1] == "$(DASK_WORKER_NAME)"  # the name the operator retires workers by


def test_names_places_and_images_are_those_of_the_file() -> None:
    manifest = KubernetesConfig(**FULL).manifest()
    assert manifest["metadata"] == {"name": "embed-7", "namespace": "vision", "ownerReferences": [FULL["owner"]]}
    assert manifest["spec"]["worker"]["replicas"] == 3
    assert manifest["spec"]["idleTimeout"] == 900
    assert worker_of(manifest)["image"] == scheduler_of(manifest)["image"] == "registry/embed:1"
    for pod in (manifest["spec"]["worker"]["spec"], manifest["spec"]["scheduler"]["spec"]):
        assert pod["serviceAccountName"] == "embedder"
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
    pod = manifest["spec"]["worker"]["spec"]
    assert pod["nodeSelector"] == FULL["node_selector"] and pod["tolerations"] == FULL["tolerations"]
    assert pod["volumes"] == FULL["pod"]["volumes"]
    assert worker_of(manifest)["volumeMounts"] == FULL["container"]["volumeMounts"]
    # The scheduler needs none of the GPU nodes that the workers are sent to.
    assert not {"nodeSelector", "tolerations", "volumes"} & set(manifest["spec"]["scheduler"]["spec"])


def test_credentials_are_named_never_held() -> None:
    worker = worker_of(KubernetesConfig(**FULL).manifest())
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hugging-face", "key": "token"}}} in worker[
        "env"
    ]
    assert [variable for variable in worker["env"] if "value" in variable] == [
        {"name": "AWS_REGION", "value": "eu-west-1"}
    ]
    assert worker["envFrom"] == [{"secretRef": {"name": "aws"}}]


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "db_password", "API_KEY"])
def test_a_credential_in_the_file_is_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(UsageError, match=rf"env\.{name}: .*secret_env") as raised:
        KubernetesConfig(image="i", env={name: "hunter2"})
    assert "hunter2" not in str(raised.value)
    with pytest.raises(UsageError, match=rf"secret_env\.{name}: ") as raised:
        KubernetesConfig(image="i", secret_env={name: "hunter2"})
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "AWS_WEB_IDENTITY_TOKEN_FILE", "HF_TOKEN_PATH", "KEYBOARD"])
def test_variables_that_only_sound_like_credentials_pass(name: str) -> None:
    assert worker_of(KubernetesConfig(image="i", env={name: "x"}).manifest())["env"] == [{"name": name, "value": "x"}]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"image": ""}, "image"),
        ({"name": "Not_A_Label"}, "name"),
        ({"name": "a" * 54}, "name"),
        ({"memory": "16 GB"}, "memory"),
        ({"memory": "1Gi", "workers_per_node": 8}, "memory"),
        ({"scheduler_memory": "lots"}, "scheduler_memory"),
        ({"cpu": 0}, "cpu"),
        ({"scheduler_cpu": float("nan")}, "scheduler_cpu"),
        ({"idle_timeout": -1}, "idle_timeout"),
        ({"service_type": "Ingress"}, "service_type"),
        ({"owner": {"kind": "Pod", "name": "embed-1"}}, "owner"),
        ({"wait_for_workers": 2}, "wait_for_workers"),
        ({"options": {"n_workers": 3}}, "options.n_workers"),
        ({"options": {"custom_cluster_spec": {}}}, "options.custom_cluster_spec"),
        ({"pod": {"containers": []}}, "pod.containers"),
        ({"pod": {"nodeSelector": {}}}, "pod.nodeSelector"),
        ({"container": {"args": []}}, "container.args"),
    ],
)
def test_what_cannot_be_is_refused_with_file_and_key(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError, match=rf"^pods\.yaml: {key}: "):
        KubernetesConfig(**{"image": "i", "path": "pods.yaml"} | settings)


@pytest.mark.parametrize(
    ("quantity", "size"), [("16Gi", 16 * 2**30), ("1.5G", 1_500_000_000), ("512Mi", 2**29), ("2Ti", 2**41), ("77", 77)]
)
def test_memory_is_read_as_kubernetes_writes_it(quantity: str, size: int) -> None:
    assert memory_bytes(quantity) == size


def crd() -> dict[str, Any]:
    """The schema that the operator installs, made to refuse what it would silently drop."""
    import dask_kubernetes

    folder = Path(dask_kubernetes.__file__).parent / "operator/deployment/helm/dask-kubernetes-operator/crds"
    versions = yaml.safe_load((folder / "daskcluster.yaml").read_text())["spec"]["versions"]
    schema = versions[0]["schema"]["openAPIV3Schema"]

    def close(node: Any) -> None:
        if isinstance(node, dict):
            if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
                node.setdefault("additionalProperties", False)
            if node.get("x-kubernetes-int-or-string"):
                node.pop("type", None)
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            close(child)

    close(schema["properties"]["spec"])
    return schema


@pytest.mark.parametrize("settings", [FULL, {"image": "i"}], ids=["full", "least"])
def test_manifests_hold_to_the_schema_of_the_operators_resource(settings: dict[str, Any]) -> None:
    import jsonschema

    schema = crd()
    manifest = KubernetesConfig(**settings).manifest()
    jsonschema.validate(manifest, schema)
    worker_of(manifest)["limits"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, schema)


def test_the_manifest_has_the_shape_of_dask_kubernetes_own() -> None:
    from dask_kubernetes import operator

    ours = KubernetesConfig(image="i", name="n", nodes=2, service_type="LoadBalancer").manifest()
    theirs = operator.make_cluster_spec("n", image="i", n_workers=2, scheduler_service_type="LoadBalancer")
    assert ours["apiVersion"] == theirs["apiVersion"] and ours["kind"] == theirs["kind"]
    assert ours["metadata"] == theirs["metadata"]
    assert ours["spec"].keys() == theirs["spec"].keys()
    assert ours["spec"]["worker"]["replicas"] == theirs["spec"]["worker"]["replicas"]
    assert ours["spec"]["scheduler"]["service"] == theirs["spec"]["scheduler"]["service"]
    for container_of in (worker_of, scheduler_of):
        assert container_of(theirs).keys() <= container_of(ours).keys() | {"env"}
        assert container_of(ours)["ports"] == container_of(theirs)["ports"]
        assert container_of(ours)["name"] == container_of(theirs)["name"]


@pytest.mark.parametrize("name", ["kubernetes.yaml", "kubernetes-gpu.yaml"])
def test_the_ready_made_files_become_manifests(name: str) -> None:
    config = read_cluster(REPO / "examples" / "clusters" / name)
    assert isinstance(config, KubernetesConfig)
    assert ("nvidia.com/gpu" in worker_of(config.manifest())["resources"]["limits"]) == ("gpu" in name)


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}}]},
         "ImagePullBackOff: no such tag"),
        ({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                          "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."}]},
         "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
        ({"containerStatuses": [{"state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}]}, "OOMKilled"),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}, None),
        ({"containerStatuses": [{"state": {"running": {}}}],
          "conditions": [{"type": "Ready", "status": "True"}]}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_a_pods_problem_is_told_in_kubernetes_words(status: dict[str, Any], problem: str | None) -> None:
    assert pod_problem({"status": status}) == problem


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_kubernetes.operator", None)
    with pytest.raises(MissingExtra, match=r"curator-embed\[kubernetes\]"):
        KubernetesConfig(image="i").start()


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Kubernetes], None]]:
    """Serve an API and make it the one that the kubeconfig names."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def serve(kubernetes: Kubernetes) -> None:
            kubeconfig = tmp_path / "kubeconfig"
            stack.enter_context(serving(kubernetes, kubeconfig))
            monkeypatch.setenv("KUBECONFIG", str(kubeconfig))

        yield serve


def config(folder: Path, **settings: Any) -> Path:
    """A cluster file; a load balancer is how a driver outside of the cluster reaches the scheduler."""
    path = folder / "cluster.yaml"
    said = {"cluster": "kubernetes", "image": "i", "memory": "1Gi", "service_type": "LoadBalancer", "wait_seconds": 60}
    path.write_text(yaml.safe_dump(said | settings))
    return path


def tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def test_a_run_survives_a_pod_that_dies_and_leaves_no_pod_behind(
    api: Callable[[Kubernetes], None], tmp_path: Path, wheel_photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPO))  # what the image has installed
    kubernetes = Kubernetes(secrets={"hugging-face": {"token": "t0ken"}, "aws": {"AWS_ACCESS_KEY_ID": "id"}})
    api(kubernetes)
    data = write_dataset(tmp_path / "data", wheel_photos, shards=4, samples=4)
    path = config(
        tmp_path, nodes=2, wait_for_workers=2, secret_env={"HF_TOKEN": "hugging-face/token"}, secrets=["aws"],
        env={"COLOUR": "green"},
    )  # fmt: skip
    with get_client(config=path) as client:
        seen = client.run(lambda: tuple(os.environ[name] for name in ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "COLOUR")))
        assert list(seen.values()) == [("t0ken", "id", "green")] * 2
        victim = next(pod for name, pod in kubernetes.pods.items() if name.endswith("worker-0"))
        go = tmp_path / "go"

        works = threading.Event()

        def interfere() -> None:
            for _ in range(600):
                if any(tasks for address, tasks in client.processing().items() if victim.address in address):
                    works.set()
                    break
                time.sleep(0.1)
            victim.kill()
            time.sleep(1)
            go.touch()

        thread = threading.Thread(target=interfere)
        thread.start()
        dataset = ImageTextPairDataset.from_webdataset(str(data), id_col="key")
        report = WaitingEmbedder(go)(dataset).save_metadata(str(tmp_path / "out")).to_dict()
        thread.join()
        client.wait_for_workers(2, timeout=60)  # as many as at the start: a run settles its threads by them
        WaitingEmbedder(go)(dataset).save_metadata(str(tmp_path / "undisturbed"))
    assert tables(tmp_path / "out") == tables(tmp_path / "undisturbed") and len(tables(tmp_path / "out")) == 4
    assert report["embedded"] == 16 and report["read"] == report["embedded"] + report["failed"] + report["no_image"]
    assert works.is_set() and victim.starts >= 2  # it had shards, and Kubernetes started it again
    assert not kubernetes.clusters and not kubernetes.pods  # closing the client removed them
    # The token was in the Secret and in the worker's environment, and in nothing that was sent to the API.
    assert "t0ken" not in json.dumps(kubernetes.created)


def test_a_worker_has_the_cores_of_its_pods_limit_not_of_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dask.system.os.sched_getaffinity", lambda _: set(range(96)))
    monkeypatch.setattr("dask.system.os.process_cpu_count", lambda: 96, raising=False)
    monkeypatch.setattr("dask.system.psutil", None)
    with get_client("cpu") as client:
        assert cores_per_worker(client) == 96
        monkeypatch.setattr("dask.system._try_extract_cgroup_cpu_quota", lambda: (800_000, 100_000))  # cpu: 8
        assert cores_per_worker(client) == 8


def test_a_name_that_is_taken_is_not_connected_to(api: Callable[[Kubernetes], None], tmp_path: Path) -> None:
    kubernetes = Kubernetes()
    api(kubernetes)
    path = config(tmp_path)
    other = KubernetesConfig(image="another").manifest()
    kubernetes.operator = False
    kubernetes.create(other)
    with pytest.raises(UsageError, match="kubectl delete daskcluster curator-embed"):
        read_cluster(path).start()
    from dask_kubernetes.operator.kubecluster.kubecluster import reap_clusters

    reap_clusters()  # what dask-kubernetes does at exit
    assert list(kubernetes.clusters) == ["curator-embed"]  # not ours to remove


def test_an_image_that_cannot_be_pulled_ends_the_wait_and_says_so(
    api: Callable[[Kubernetes], None], tmp_path: Path
) -> None:
    kubernetes = Kubernetes(stuck={"waiting": {"reason": "ImagePullBackOff", "message": "manifest unknown"}})
    api(kubernetes)
    with pytest.raises(CuratorEmbedError, match=r"within 3 s .*embed-scheduler: ImagePullBackOff: manifest"):
        read_cluster(config(tmp_path, wait_seconds=3)).start()
    assert not kubernetes.clusters


def test_workers_that_find_no_node_are_told_in_kubernetes_words(
    api: Callable[[Kubernetes], None], tmp_path: Path
) -> None:
    kubernetes = Kubernetes(
        stuck={"waiting": {"reason": "ErrImagePull", "message": "denied"}}, stuck_component="worker"
    )
    api(kubernetes)
    with pytest.raises(CuratorEmbedError, match=r"pod curator-embed-default-worker-0: ErrImagePull: denied"):
        get_client(config=config(tmp_path, wait_seconds=6))
    assert not kubernetes.clusters


def test_who_does_not_want_to_wait_leaves_nothing_behind(api: Callable[[Kubernetes], None], tmp_path: Path) -> None:
    kubernetes = Kubernetes(stuck={"waiting": {"reason": "ImagePullBackOff"}})
    api(kubernetes)

    def interrupt() -> None:
        while not kubernetes.created:
            time.sleep(0.05)
        signal.pthread_kill(main, signal.SIGINT)

    main = threading.get_ident()
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        read_cluster(config(tmp_path)).start()
    assert kubernetes.created and not kubernetes.clusters


def test_a_cluster_without_dasks_operator_says_how_to_install_it(
    api: Callable[[Kubernetes], None], tmp_path: Path
) -> None:
    kubernetes = Kubernetes(operator=False)
    api(kubernetes)
    with pytest.raises(CuratorEmbedError, match="helm install"):
        read_cluster(config(tmp_path, options={"resource_timeout": 1})).start()
    assert not kubernetes.clusters


def test_a_cluster_without_the_resource_says_how_to_install_it(
    api: Callable[[Kubernetes], None], tmp_path: Path
) -> None:
    api(Kubernetes(has_crd=False))
    with pytest.raises(CuratorEmbedError, match="helm install"):
        read_cluster(config(tmp_path)).start()


def test_an_api_that_does_not_answer_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Kubernetes(), tmp_path / "kubeconfig"):
        pass  # the kubeconfig of a server that is gone
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with pytest.raises(CuratorEmbedError, match="kubectl get daskclusters"):
        read_cluster(config(tmp_path)).start()


def test_an_unknown_create_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"options\.create_mode: choose one of CREATE_ONLY"):
        read_cluster(config(tmp_path, options={"create_mode": "RECREATE"})).start()
