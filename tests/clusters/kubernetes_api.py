"""A Kubernetes API small enough for a test: it keeps resources in memory, and its operator starts real processes.

Containers of Dask's pods run as processes of this machine, each pod on a loopback address of its own. What a container
gets is what its manifest says: arguments, environment, values from Secrets. Dead pods are started again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

DASK = "dask.org/cluster-name"
OF_DASK = "/apis/kubernetes.dask.org/v1"
# All of 127.0.0.0/8 is this machine's: addresses for this process, whatever else is tested at the same time.
NETWORK = f"127.{40 + os.getpid() % 200}"
_ADDRESSES = (f"{NETWORK}.{number // 250}.{number % 250 + 1}" for number in count())
_ITEM = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/v1/namespaces/[^/]+/(?P<kind>[a-z]+)(?:/(?P<name>[^/]+))?(?:/status)?"
)

_DISCOVERY: dict[str, dict[str, Any]] = {
    "/version": {"major": "1", "minor": "32", "gitVersion": "v1.32.0"},
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/api/v1": {
        "kind": "APIResourceList",
        "groupVersion": "v1",
        "resources": [
            {"name": "pods", "singularName": "pod", "namespaced": True, "kind": "Pod"},
            {"name": "services", "singularName": "service", "namespaced": True, "kind": "Service"},
        ],
    },
    "/apis": {"kind": "APIGroupList", "groups": []},
}


@dataclass
class Pod:
    """One container's process, and what the API says of it."""

    component: str
    manifest: dict[str, Any]
    address: str = field(default_factory=lambda: next(_ADDRESSES))
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def kill(self) -> None:
        """End all processes of the pod at once, as a node does that is lost."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass
class Kubernetes:
    """What the API holds, and what its operator does about DaskClusters.

    Attributes:
        operator: whether anything happens when a DaskCluster is created.
        log: where the pods' output goes.
        asked: verb, API group and resource of each request: what a role has to allow.
        stuck: the container state of pods that never run, for instance for an image that is not there.
        stuck_component: which pods these are.
    """

    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    operator: bool = True
    stuck: dict[str, Any] | None = None
    stuck_component: str = "scheduler"
    has_crd: bool = True
    log: Path = Path(os.devnull)
    asked: set[tuple[str, str, str]] = field(default_factory=set)
    clusters: dict[str, dict[str, Any]] = field(default_factory=dict)
    pods: dict[str, Pod] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def create(self, cluster: dict[str, Any]) -> dict[str, Any]:
        name = cluster["metadata"]["name"]
        with self.lock:
            self.created.append(cluster)
            self.clusters[name] = cluster | {"status": {"phase": "Created"}}
            if self.operator:
                spec = cluster["spec"]
                self.clusters[name]["status"]["phase"] = "Running"
                self.pods[f"{name}-scheduler"] = Pod("scheduler", spec["scheduler"]["spec"])
                for number in range(spec["worker"]["replicas"]):
                    self.pods[f"{name}-default-worker-{number}"] = Pod("worker", spec["worker"]["spec"])
            return self.clusters[name]

    def delete(self, name: str) -> None:
        with self.lock:
            del self.clusters[name]
            pods, self.pods = self.pods, {}
        for pod in pods.values():
            pod.kill()

    def tend(self) -> None:
        """Start what should run and does not: what a Deployment does for its pod."""
        with self.lock:
            for name, pod in self.pods.items():
                if self._runs(pod) and (pod.process is None or pod.process.poll() is not None):
                    pod.process = self._start(name, pod)
                    pod.starts += 1

    def _runs(self, pod: Pod) -> bool:
        return self.stuck is None or pod.component != self.stuck_component

    def _start(self, name: str, pod: Pod) -> subprocess.Popen[bytes]:
        [container] = pod.manifest["containers"]
        given = {
            "DASK_WORKER_NAME": name,
            "DASK_SCHEDULER_ADDRESS": f"tcp://{self._scheduler().address}:8786",
        }
        for variable in container.get("env", ()):
            if "value" in variable:
                given[variable["name"]] = variable["value"]
            else:
                reference = variable["valueFrom"]["secretKeyRef"]
                given[variable["name"]] = self.secrets[reference["name"]][reference["key"]]
        for source in container.get("envFrom", ()):
            given |= self.secrets[source["secretRef"]["name"]]
        command, *args = (re.sub(r"\$\((\w+)\)", lambda found: given[found[1]], arg) for arg in container["args"])
        # All of the machine to a pod is its own address here.
        args = [re.sub(r"^(?:0\.0\.0\.0)?$", pod.address, arg) for arg in args]
        args = [f"{pod.address}{arg}" if re.fullmatch(r":\d+", arg) else arg for arg in args]
        if pod.component == "worker":
            args += ["--host", pod.address]
        else:
            args += ["--dashboard-address", f"{pod.address}:8787"]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [str(Path(sys.executable).with_name(command)), *args],
                env=os.environ | given, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _scheduler(self) -> Pod:
        return next(pod for pod in self.pods.values() if pod.component == "scheduler")

    def listed(self, kind: str) -> list[dict[str, Any]]:
        """The resources of a kind, with labels and status, as the API shows them."""
        with self.lock:
            if kind == "daskclusters":
                return list(self.clusters.values())
            if kind == "pods":
                return [self._pod(name, pod) for name, pod in self.pods.items()]
            if kind == "services":
                return [self._service(cluster) for cluster in self.clusters.values() if self.pods]
            return []

    def _pod(self, name: str, pod: Pod) -> dict[str, Any]:
        labels = {DASK: next(iter(self.clusters)), "dask.org/component": pod.component}
        runs = self._runs(pod)
        state = {"running": {}} if runs else self.stuck
        return {
            "metadata": {"name": name, "namespace": "default", "labels": labels},
            "spec": pod.manifest,
            "status": {
                "phase": "Running" if runs else "Pending",
                "podIP": pod.address,
                "conditions": [{"type": kind, "status": str(runs)} for kind in ("Ready", "ContainersReady")],
                "containerStatuses": [{"name": pod.component, "ready": runs, "state": state}],
            },
        }

    def _service(self, cluster: dict[str, Any]) -> dict[str, Any]:
        name = cluster["metadata"]["name"]
        return {
            "metadata": {"name": f"{name}-scheduler", "namespace": "default",
                         "labels": {DASK: name, "dask.org/component": "scheduler"}},
            "spec": cluster["spec"]["scheduler"]["service"] | {"clusterIP": self._scheduler().address},
            "status": {"loadBalancer": {"ingress": [{"ip": self._scheduler().address}]}},
        }  # fmt: skip


@contextmanager
def serving(kubernetes: Kubernetes, kubeconfig: Path) -> Iterator[None]:
    """Serve the API and tend its pods; write how to reach it into a kubeconfig."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path = url.path.rstrip("/")
            if path in _DISCOVERY:
                return self._answer(_DISCOVERY[path])
            match = _ITEM.fullmatch(path)
            self._note("get" if match and match["name"] else "list")
            kind = match["kind"] if match else ""
            found = kubernetes.listed(kind)
            if match is None or (kind == "daskclusters" and not kubernetes.has_crd):
                return self._unknown()
            if match["name"]:
                named = [item for item in found if item["metadata"]["name"] == match["name"]]
                return self._answer(named[0]) if named else self._not_found(match["name"])
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            wanted = dict(part.split("=", 1) for part in query.get("labelSelector", "").split(",") if part)
            fields = dict(part.split("=", 1) for part in query.get("fieldSelector", "").split(",") if part)
            items = [item for item in found if wanted.items() <= item["metadata"].get("labels", {}).items()]
            if "status.phase" in fields:
                items = [item for item in items if item["status"]["phase"] == fields["status.phase"]]
            if "metadata.name" in fields:
                items = [item for item in items if item["metadata"]["name"] == fields["metadata.name"]]
            return self._answer({"kind": "List", "apiVersion": "v1", "metadata": {}, "items": items})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not (kubernetes.has_crd and urlsplit(self.path).path.rstrip("/").endswith("/daskclusters")):
                return self._unknown()
            self._note("create")
            return self._answer(kubernetes.create(body), 201)

        def do_DELETE(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._note("delete")
            kubernetes.delete(urlsplit(self.path).path.rstrip("/").rpartition("/")[2])
            self._answer({"kind": "Status", "status": "Success"})

        def _note(self, verb: str) -> None:
            if match := _ITEM.fullmatch(urlsplit(self.path).path.rstrip("/")):
                kubernetes.asked.add((verb, match["group"] or "", match["kind"]))

        def _unknown(self) -> None:
            self._send(404, "text/plain", b"404 page not found\n")

        def _not_found(self, name: str) -> None:
            message = f'"{name}" not found'
            self._answer({"kind": "Status", "status": "Failure", "reason": "NotFound", "message": message}, 404)

        def _answer(self, body: Any, code: int = 200) -> None:
            self._send(code, "application/json", json.dumps(body).encode())

        def _send(self, code: int, kind: str, data: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            if os.environ.get("SHOW_KUBERNETES_API"):
                sys.stderr.write(f"{format % args}\n")

    kubernetes.log = kubeconfig.with_name("pods.log")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    kubeconfig.write_text(
        json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "users": [{"name": "test", "user": {"token": "none"}}],
            "contexts": [{"name": "test",
                          "context": {"cluster": "test", "user": "test", "namespace": "default"}}],
        })
    )  # fmt: skip
    over = threading.Event()

    def tend() -> None:
        while not over.wait(0.2):
            kubernetes.tend()

    threads = [threading.Thread(target=server.serve_forever), threading.Thread(target=tend)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        server.shutdown()
        for thread in threads:
            thread.join()
        for name in list(kubernetes.clusters):
            kubernetes.delete(name)
        server.server_close()
