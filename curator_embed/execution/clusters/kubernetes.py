"""A Dask cluster on Kubernetes: the resource that Dask's operator turns into pods, and starting it.

The manifest is a pure function of the config, so that it can be read, checked and kept before anything is started.
"""

from __future__ import annotations

import logging
import math
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, ClassVar, cast

from curator_embed.errors import CuratorEmbedError, MissingExtra, UsageError
from curator_embed.execution.clusters.config import ClusterConfig

logger = logging.getLogger(__name__)

API_VERSION = "kubernetes.dask.org/v1"
SCHEDULER_PORT, DASHBOARD_PORT, WORKER_DASHBOARD_PORT = 8786, 8787, 8788

OPERATOR = (
    "helm install --repo https://helm.dask.org --create-namespace -n dask-operator --generate-name "
    "dask-kubernetes-operator"
)

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,51}[a-z0-9])?")  # a label of 63, less the operator's "-scheduler"
_SECRET_NAME = re.compile(r"(^|_)(SECRET|TOKEN|PASSWORD|PASSWD|KEY)(_ID)?(_|$)", re.IGNORECASE)
_PLACE_NAME = re.compile(r"_(FILE|PATH|DIR)$", re.IGNORECASE)  # where a secret lies is none itself
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(Ki|Mi|Gi|Ti|k|M|G|T)?")
_LEAST_MEMORY = 256 * 2**20
_MARK = "curator-embed/started-by"
_OWNER = {"apiVersion", "kind", "name", "uid"}
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{letter}i": 2 ** (10 * power) for power, letter in enumerate("KMGT", 1)
}
_IN_THE_MANIFEST = {
    "custom_cluster_spec": "the keys of this file",
    "name": "'name'",
    "namespace": "'namespace'",
    "image": "'image'",
    "n_workers": "'nodes'",
    "resources": "'cpu', 'memory' and 'gpus_per_node'",
    "env": "'env' and 'secret_env'",
    "worker_command": "'worker_args'",
    "scheduler_service_type": "'service_type'",
    "idle_timeout": "'idle_timeout'",
}
"""Options of ``KubeCluster`` that it ignores beside a manifest, and the keys to use instead."""

_DEFAULTS = {"create_mode": "CREATE_ONLY"}
"""Connecting to what happens to have the name would run this on another image without a word."""


@dataclass(frozen=True, kw_only=True)
class KubernetesConfig(ClusterConfig):
    """Pods that Dask's operator starts: one for the scheduler, ``nodes`` for workers.

    ``options`` go to ``dask_kubernetes.operator.KubeCluster`` (``resource_timeout``, ``port_forward_cluster_ip``,
    ``scheduler_forward_port``, ``create_mode``, ``shutdown_on_close``, ...).

    Attributes:
        image: container image of all pods, with this package, Dask and, for GPUs, dask-cuda in it.
        name: name of the DaskCluster resource; two that run at once in a namespace need two names.
        namespace: where the pods run; by default the kubeconfig's, or the driver pod's own.
        cpu: cores of a worker pod.
        memory: memory of a worker pod, as Kubernetes writes it ("64Gi"); its workers share it evenly.
        scheduler_cpu: cores of the scheduler's pod.
        scheduler_memory: memory of the scheduler's pod.
        env: environment variables of the workers. No credentials: those come by reference.
        secret_env: variable -> "secret/key": variables whose values Kubernetes takes from a Secret.
        secrets: Secrets all of whose keys become variables.
        service_account: service account of all pods (on EKS, the one bound to an IAM role for S3).
        image_pull_secrets: Secrets with the registry's credentials.
        node_selector: labels that a worker's node must have.
        tolerations: tolerations of the worker pods, as Kubernetes writes them.
        pod: further fields of the worker pods' spec ("volumes", "priorityClassName", ...).
        container: further fields of the worker containers ("volumeMounts", "securityContext", ...).
        worker_args: further arguments of ``dask worker``, or of ``dask cuda worker`` where there are GPUs.
        service_type: "ClusterIP", "LoadBalancer" or "NodePort": how the scheduler is reached.
        idle_timeout: seconds without work after which the operator removes the cluster; 0 for never. Without it
            the pods of a driver that was killed would stay.
        owner: the resource with which Kubernetes removes the cluster, with its apiVersion, kind, name and uid: the
            driver's own pod. It must be in the same namespace.
    """

    kind: ClassVar[str] = "kubernetes"

    image: str
    name: str = "curator-embed"
    namespace: str | None = None
    cpu: float = 4
    memory: str = "16Gi"
    scheduler_cpu: float = 1
    scheduler_memory: str = "4Gi"
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    secret_env: Mapping[str, str] = field(default_factory=dict)
    secrets: Sequence[str] = ()
    service_account: str | None = None
    image_pull_secrets: Sequence[str] = ()
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: Sequence[Mapping[str, Any]] = ()
    pod: Mapping[str, Any] = field(default_factory=dict)
    container: Mapping[str, Any] = field(default_factory=dict)
    worker_args: Sequence[str] = ()
    service_type: str = "ClusterIP"
    idle_timeout: int = 3600
    owner: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_wait()
        if not self.image:
            raise self.wrong("image", "name the container image that the pods run")
        if not _NAME.fullmatch(self.name):
            raise self.wrong("name", f"{self.name!r} cannot be one: at most 53 of a-z, 0-9 and '-', no '-' at its ends")
        if self.service_type not in ("ClusterIP", "LoadBalancer", "NodePort"):
            raise self.wrong("service_type", f"{self.service_type!r}: choose ClusterIP, LoadBalancer or NodePort")
        for key, quantity in (("memory", self.memory), ("scheduler_memory", self.scheduler_memory)):
            if not _QUANTITY.fullmatch(quantity):
                raise self.wrong(key, f"{quantity!r} is no quantity of Kubernetes, such as 16Gi")
        if memory_bytes(self.memory) // self._workers_of_a_pod < _LEAST_MEMORY:
            raise self.wrong("memory", f"{self.memory} is less than 256Mi for each worker of a pod: none would start")
        for key, cores in (("cpu", self.cpu), ("scheduler_cpu", self.scheduler_cpu)):
            if not 0 < cores < math.inf:  # not a number compares false
                raise self.wrong(key, f"{cores} is no number of cores; more than 0")
        if self.idle_timeout < 0:
            raise self.wrong("idle_timeout", f"{self.idle_timeout} is no time; seconds, or 0 for never")
        if self.owner and self.owner.keys() != _OWNER:
            raise self.wrong("owner", f"needs the keys {', '.join(sorted(_OWNER))}, and has {', '.join(self.owner)}")
        for variable in self.env:
            if _SECRET_NAME.search(variable) and not _PLACE_NAME.search(variable):
                raise self.wrong(
                    f"env.{variable}",
                    f"a credential does not belong in this file. Put it into a Secret and write "
                    f"'secret_env: {{{variable}: SECRET/KEY}}'",
                )
        for variable, reference in self.secret_env.items():
            if not re.fullmatch(r"[^/\s]+/[^/\s]+", reference):
                # The value is not shown: it may be the credential itself.
                raise self.wrong(f"secret_env.{variable}", "write it as SECRET/KEY, the Secret and the key in it")
        for option in self.options:
            if option in _IN_THE_MANIFEST:
                raise self.wrong(f"options.{option}", f"it has no effect here; use {_IN_THE_MANIFEST[option]}")
        self.manifest()

    def manifest(self) -> dict[str, Any]:
        """The DaskCluster resource: what ``kubectl apply`` takes and the operator carries out.

        Raises:
            UsageError: ``pod`` or ``container`` holds a field that has a key of its own.
        """
        metadata: dict[str, Any] = {"name": self.name}
        if self.namespace is not None:
            metadata["namespace"] = self.namespace
        if self.owner:
            metadata["ownerReferences"] = [dict(self.owner)]
        return {
            "apiVersion": API_VERSION,
            "kind": "DaskCluster",
            "metadata": metadata,
            "spec": {
                "idleTimeout": self.idle_timeout,
                "worker": {"replicas": self.nodes, "spec": self._worker_pod()},
                "scheduler": {"spec": self._scheduler_pod(), "service": self._service()},
            },
        }

    def check(self) -> None:
        """See ``ClusterConfig.check``: dask-kubernetes, and the names of its options."""
        try:
            from dask_kubernetes.operator import KubeCluster
            from dask_kubernetes.operator.kubecluster.kubecluster import CreateMode
        except ImportError as error:
            raise MissingExtra("dask-kubernetes", "kubernetes", f"{self.path}: cluster: kubernetes") from error
        self.check_names("options", self.options, "dask_kubernetes.operator.KubeCluster", KubeCluster)
        choices = [mode.value for mode in CreateMode]
        if (_DEFAULTS | dict(self.options))["create_mode"] not in choices:
            raise self.wrong("options.create_mode", f"choose one of {', '.join(choices)}")

    def start(self) -> Any:
        """Create the resource and wait, ``wait_seconds`` at most, until the scheduler's pod answers.

        Returns:
            A ``dask_kubernetes.operator.KubeCluster``; closing it removes the pods.
        """
        self.check()
        from dask_kubernetes.operator import KubeCluster
        from dask_kubernetes.operator.kubecluster.kubecluster import CreateMode

        options = _DEFAULTS | dict(self.options)
        mode = CreateMode(options.pop("create_mode"))
        # A KubeCluster that closes its cluster does so at exit as well, even when it never started because the name
        # was another's. So it is told to only once the cluster is known to be this run's.
        removes = options.pop("shutdown_on_close", None)
        manifest = self.manifest()
        mark = uuid.uuid4().hex
        manifest["metadata"]["annotations"] = {_MARK: mark}

        def create() -> Any:
            return KubeCluster(
                custom_cluster_spec=manifest,
                namespace=self.namespace,
                create_mode=mode,
                shutdown_on_close=False,
                **{"quiet": True} | options,
            )

        # KubeCluster waits for the scheduler's pod without a limit: an image that cannot be pulled would never end.
        started: Future[Any] = Future()
        Thread(target=_settle, args=(started, create), name="start-kubernetes", daemon=True).start()
        try:
            cluster = started.result(timeout=self.wait_seconds)
            cluster.shutdown_on_close = self._created(mark) is not None if removes is None else removes
            return cluster
        except Exception as error:
            if isinstance(error, TimeoutError) and not started.done():
                problems = self._pod_problems() or ["no pod has a problem that Kubernetes tells of"]
                failed = CuratorEmbedError(
                    f"{self.path}: no Dask scheduler within {self.wait_seconds:g} s (wait_seconds): "
                    + "; ".join(problems)
                )
            else:
                failed = self._failed(error)
            self._remove(mark)
            raise failed from error
        except KeyboardInterrupt:
            self._remove(mark)
            raise

    def cores_per_worker(self) -> int:
        """See ``ClusterConfig.cores_per_worker``."""
        return max(1, int(self.cpu) // self._workers_of_a_pod)

    def where_to_look(self) -> str:
        pods = f"'kubectl {self._in_namespace}get pods -l dask.org/cluster-name={self.name}'"
        return "; ".join([pods, *self._pod_problems()])

    def _failed(self, error: Exception) -> CuratorEmbedError:
        """What an error of dask-kubernetes or of the API means here."""
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, ValueError) and "already exists" in str(error):
            return UsageError(
                f"{self.path}: a DaskCluster named {self.name} is there already, another run's or one left over. "
                f"Write another 'name', or remove it: kubectl {self._in_namespace}delete daskcluster {self.name}"
            )
        unknown = getattr(getattr(error, "response", None), "status_code", None) == 404
        if unknown or "Dask Operator running" in str(error):
            return CuratorEmbedError(
                f"{self.path}: Dask's operator is not on this cluster ({said}). Install: {OPERATOR}"
            )
        return CuratorEmbedError(
            f"{self.path}: the cluster did not start ({said}). Does 'kubectl {self._in_namespace}get daskclusters' "
            "answer with the same kubeconfig?"
        )

    def _pod_problems(self) -> list[str]:
        from kr8s.objects import Pod

        try:
            label = f"dask.org/cluster-name={self.name}"
            pods = [pod.raw for pod in cast(Iterable[Pod], Pod.list(namespace=self.namespace, label_selector=label))]
        except Exception as error:
            return [f"the Kubernetes API does not answer ({error})"]
        problems = ((pod["metadata"]["name"], pod_problem(pod)) for pod in pods)
        return [f"pod {name}: {problem}" for name, problem in problems if problem]

    def _created(self, mark: str) -> Any:
        """The DaskCluster of this name if it was created with this mark, else None."""
        from kr8s import NotFoundError
        from kr8s.objects import new_class

        try:
            found = new_class("DaskCluster", API_VERSION).get(self.name, namespace=self.namespace)
        except NotFoundError:
            return None
        return found if found.annotations.get(_MARK) == mark else None

    def _remove(self, mark: str) -> None:
        """Nobody will close a cluster that did not start: remove what was created of it."""
        try:
            if (cluster := self._created(mark)) is not None:
                cluster.delete()
        except Exception as error:
            logger.info("%s: DaskCluster %s was not looked for or removed: %s", self.path, self.name, error)

    @property
    def _in_namespace(self) -> str:
        return "" if self.namespace is None else f"-n {self.namespace} "

    @property
    def _workers_of_a_pod(self) -> int:
        return self.gpus_per_node or self.workers_per_node

    def _worker_pod(self) -> dict[str, Any]:
        workers = self._workers_of_a_pod
        # 'auto' would give a worker the share of the pod's memory that its threads are of the pod's cores.
        share = memory_bytes(self.memory) // workers
        args = ["dask", "cuda", "worker"] if self.gpus_per_node else ["dask", "worker", "--nworkers", str(workers)]
        args += ["--name", "$(DASK_WORKER_NAME)", "--nthreads", str(self.threads_per_worker)]
        args += ["--memory-limit", str(share), "--dashboard", "--dashboard-address", f":{WORKER_DASHBOARD_PORT}"]
        container: dict[str, Any] = {
            "name": "worker",
            "image": self.image,
            "args": [*args, *self.worker_args],
            "env": [{"name": name, "value": value} for name, value in self.env.items()]
            + [_from_secret(name, reference) for name, reference in self.secret_env.items()],
            "envFrom": [{"secretRef": {"name": name}} for name in self.secrets],
            "resources": _resources(self.cpu, self.memory, self.gpus_per_node),
            "ports": [_port("http-dashboard", WORKER_DASHBOARD_PORT)],
        }
        pod: dict[str, Any] = self._pod() | {"containers": [self._with(container, self.container, "container")]}
        if self.node_selector:
            pod["nodeSelector"] = dict(self.node_selector)
        if self.tolerations:
            pod["tolerations"] = [dict(toleration) for toleration in self.tolerations]
        return self._with(pod, self.pod, "pod")

    def _scheduler_pod(self) -> dict[str, Any]:
        container = {
            "name": "scheduler",
            "image": self.image,
            "args": ["dask", "scheduler", "--host", "0.0.0.0"],
            "resources": _resources(self.scheduler_cpu, self.scheduler_memory, 0),
            "ports": [_port("tcp-comm", SCHEDULER_PORT), _port("http-dashboard", DASHBOARD_PORT)],
            "readinessProbe": _health(periodSeconds=2, timeoutSeconds=10),
            # A scheduler that is restarted loses the run: only one that is silent for minutes is taken for dead.
            "livenessProbe": _health(initialDelaySeconds=30, periodSeconds=30, timeoutSeconds=30, failureThreshold=5),
        }
        return self._pod() | {"containers": [container]}

    def _service(self) -> dict[str, Any]:
        ports = (("tcp-comm", SCHEDULER_PORT), ("http-dashboard", DASHBOARD_PORT))
        return {
            "type": self.service_type,
            "selector": {"dask.org/cluster-name": self.name, "dask.org/component": "scheduler"},
            "ports": [{"name": name, "protocol": "TCP", "port": port, "targetPort": name} for name, port in ports],
        }

    def _pod(self) -> dict[str, Any]:
        """What all pods have in common."""
        pod: dict[str, Any] = {}
        if self.service_account is not None:
            pod["serviceAccountName"] = self.service_account
        if self.image_pull_secrets:
            pod["imagePullSecrets"] = [{"name": name} for name in self.image_pull_secrets]
        return pod

    def _with(self, ours: dict[str, Any], further: Mapping[str, Any], key: str) -> dict[str, Any]:
        for name in further:
            if name in ours or name in ("containers", "nodeSelector", "tolerations", "serviceAccountName"):
                raise self.wrong(f"{key}.{name}", "this field comes from the file's other keys; remove it here")
        return ours | dict(further)


def memory_bytes(quantity: str) -> int:
    """Kubernetes' way to write memory ("16Gi", "500M", "1000000") in bytes."""
    match = _QUANTITY.fullmatch(quantity)
    if match is None:
        raise ValueError(f"{quantity!r} is no quantity of Kubernetes, such as 16Gi")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def pod_problem(pod: Mapping[str, Any]) -> str | None:
    """Why a pod does not run, in Kubernetes' own words; None where it runs or is only about to.

    Args:
        pod: a Pod as the API gives it.
    """
    status = pod.get("status", {})
    for container in status.get("containerStatuses", ()):
        waiting = container.get("state", {}).get("waiting")
        if waiting and waiting.get("reason") not in ("ContainerCreating", "PodInitializing"):
            return _words(waiting)
        ended = container.get("state", {}).get("terminated")
        if ended:
            return _words(ended)
    for condition in status.get("conditions", ()):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return _words(condition)
    return None


def _words(state: Mapping[str, Any]) -> str:
    return ": ".join(str(state[key]) for key in ("reason", "message") if state.get(key))


def _settle(future: Future[Any], call: Any) -> None:
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)


def _resources(cpu: float, memory: str, gpus: int) -> dict[str, Any]:
    """Requests equal limits: such pods are the last that a node under pressure evicts, and GPUs allow nothing else."""
    amounts: dict[str, Any] = {"cpu": f"{cpu:g}", "memory": memory}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    return {"limits": amounts, "requests": dict(amounts)}


def _from_secret(variable: str, reference: str) -> dict[str, Any]:
    name, key = reference.split("/")
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}


def _health(**timing: int) -> dict[str, Any]:
    return {"httpGet": {"port": "http-dashboard", "path": "/health"}, **timing}


def _port(name: str, number: int) -> dict[str, Any]:
    return {"name": name, "containerPort": number, "protocol": "TCP"}
