"""The files in examples/deploy: that they parse, fit together, and do on one machine what they are to do on many."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import Client, LocalCluster

from curator_embed.execution.clusters import read_cluster
from curator_embed.execution.clusters.databricks import DatabricksConfig
from curator_embed.execution.clusters.kubernetes import KubernetesConfig
from tests.clusters.kubernetes_api import NETWORK, Kubernetes, serving
from tests.conftest import REPO
from tests.shards import write_dataset

DEPLOY = REPO / "examples" / "deploy"
MODULES = sorted({path.parent for path in DEPLOY.rglob("*.tf")})
DRIVER = f"{NETWORK}.252.1"  # a driver node's address
WHEEL = "curator_embed-0.1.0-py3-none-any.whl"

needs_terraform = pytest.mark.skipif(shutil.which("terraform") is None, reason="terraform is not on the PATH")


def terraform(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["terraform", *arguments], cwd=folder, capture_output=True, text=True, timeout=60,
        env=os.environ | {"CHECKPOINT_DISABLE": "1", "TF_IN_AUTOMATION": "1"},
    )  # fmt: skip


def hcl(module: Path) -> str:
    """A module's text without comments and descriptions."""
    text = "\n".join(path.read_text() for path in sorted(module.glob("*.tf")))
    return re.sub(r"^\s*#.*$|^\s*(?:description|error_message)\s*=.*$", "", text, flags=re.M)


@needs_terraform
def test_terraform_finds_the_files_formatted_and_parses_them() -> None:
    assert len(MODULES) == 3
    done = terraform(DEPLOY, "fmt", "-check", "-recursive", "-diff")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(DEPLOY).as_posix())
def test_what_a_module_names_it_declares_and_what_it_declares_it_uses(module: Path) -> None:
    text = hcl(module)
    declared = set(re.findall(r'^variable "(\w+)"', text, re.M))
    assert set(re.findall(r"\bvar\.(\w+)", text)) == declared
    outside = re.sub(r'^variable "\w+" \{.*?^\}', "", text, flags=re.M | re.S)
    assert set(re.findall(r"\bvar\.(\w+)", outside)) == declared  # a variable's own condition is no use of it
    objects = set(re.findall(r'^resource "(\w+)" "(\w+)"', text, re.M))
    data = set(re.findall(r'^data "(\w+)" "(\w+)"', text, re.M))
    named = re.findall(r"(?<![\w.\"/-])(data\.)?((?:aws|databricks|time)_\w+)\.(\w+)", text)
    for of_data, kind, name in named:
        assert (kind, name) in (data if of_data else objects), f"{of_data}{kind}.{name}"
    assert data <= {(kind, name) for of_data, kind, name in named if of_data}
    block = re.search(r"^locals \{(.*?)^\}", text, re.M | re.S)
    local = set(re.findall(r"^  (\w+)\s*=", block[1], re.M)) if block else set()
    assert set(re.findall(r"\blocal\.(\w+)", text)) <= local
    for name in re.findall(r"\$\{path\.module\}/([\w.]+)", text):
        assert (module / name).is_file()


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(DEPLOY).as_posix())
def test_every_variable_says_what_it_is_and_the_example_sets_those_without_a_default(module: Path) -> None:
    text = "\n".join(path.read_text() for path in module.glob("*.tf"))
    variables = re.findall(r'^variable "(\w+)" \{(.*?)^\}', text, re.M | re.S)
    assert variables
    for name, body in variables:
        assert re.search(r'^  description = ".{15,}"$', body, re.M), name
        assert re.search(r"^  type        = ", body, re.M), name
    example = set(re.findall(r"^(\w+)\s*=", (module / "terraform.tfvars.example").read_text(), re.M))
    assert {name for name, body in variables if not re.search(r"^  default", body, re.M)} <= example
    assert example <= {name for name, _ in variables}


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    """Terraform's own opinion of a module's variables: the module without its providers, which are not at hand."""

    def prepare(module: str, outputs: str = "") -> Path:
        folder = tmp_path / module.replace("/", "-")
        folder.mkdir()
        variables = (DEPLOY / module / "variables.tf").read_text()
        (folder / "variables.tf").write_text(variables)
        (folder / "outputs.tf").write_text(outputs)
        for template in (DEPLOY / module).glob("*.tftpl"):
            shutil.copy(template, folder)
        (folder / WHEEL).touch()
        example = (DEPLOY / module / "terraform.tfvars.example").read_text()
        (folder / "terraform.tfvars").write_text(re.sub(r"^wheel .*$", f'wheel = "{WHEEL}"', example, flags=re.M))
        assert terraform(folder, "init", "-input=false").returncode == 0
        return folder

    return prepare


@needs_terraform
@pytest.mark.parametrize(
    ("module", "bad"),
    [
        ("databricks-aws/workspace", ['databricks_account_id=me', 'region=Europe', 'prefix=A', 'cidr_block=10.0.0.0/26',
                                      'read_buckets=["s3://b"]', 'write_buckets=[]', 'pricing_tier=FREE']),
        ("databricks-aws/job", ['workspace_url=dbc.cloud.databricks.com', 'instance_profile_arn=nodes', 'wheel=no.whl',
                                'extras=["s3"]', 'source_url=/data', 'output_url=out', 'batch_size=0', 'workers=0',
                                'decode_threads=1.5', 'node_type_id=m5.large', 'spark_version=17.3.x-scala2.13',
                                'availability=CHEAP', 'threads_per_worker=0', 'retries=-1', 'log_url=dbfs:/logs',
                                'secret_variables={HF_TOKEN="hunter2"}', 'folder=relative']),
        ("aws-ec2", ['region=Europe', 'vpc_id=default', 'subnet_id=a', 'instance_type=t3.large', 'wheel=no.whl',
                     'source_url=/data', 'output_url=out', 'batch_size=0', 'decode_threads=0']),
    ],
)  # fmt: skip
def test_variables_take_the_example_and_refuse_what_cannot_be(plan: Any, module: str, bad: list[str]) -> None:
    folder = plan(module)
    good = terraform(folder, "plan", "-input=false", "-no-color")
    assert good.returncode == 0, good.stderr
    for setting in bad:
        refused = terraform(folder, "plan", "-input=false", "-no-color", "-var", setting)
        assert refused.returncode != 0 and "Invalid value for variable" in refused.stderr, setting
        assert f"var.{setting.split('=')[0]}" in refused.stderr


def rendered(folder: Path) -> str:
    done = terraform(folder, "apply", "-auto-approve", "-input=false", "-no-color")
    assert done.returncode == 0, done.stderr
    return terraform(folder, "output", "-raw", "script").stdout


@pytest.fixture
def init_script(plan: Any) -> str:
    """The Databricks nodes' init script, as the job's module renders it."""
    text = hcl(DEPLOY / "databricks-aws" / "job")
    call = re.search(r"base64encode\((templatefile\(.*?\}\))\)", text, re.S)
    assert call is not None
    wheel = f"/Workspace/Shared/curator-embed/{WHEEL}"
    expression = call[1].replace("${databricks_workspace_file.wheel.workspace_path}", wheel)
    return rendered(plan("databricks-aws/job", f'output "script" {{\n  value = {expression}\n}}\n'))


@needs_terraform
def test_the_init_script_installs_the_wheel_with_its_extras(init_script: str, tmp_path: Path) -> None:
    said = run_script(init_script, tmp_path, {"pip": 'echo "pip $*"', "dask": 'echo "dask $*"'}).splitlines()
    assert said == [
        f"pip install --quiet /Workspace/Shared/curator-embed/{WHEEL}[cuda12,databricks,s3]",
        'dask databricks run --cuda --worker-args ["--nthreads","2"]',
    ]


def run_script(script: str, folder: Path, programs: dict[str, str], **environment: str) -> str:
    """Run an init script with these programs in the place of the runtime's; what it starts may go on."""
    bin = folder / "bin"
    bin.mkdir()
    for name, text in programs.items():
        (bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin / name).chmod(0o755)
    here = script.replace("/databricks/python/bin", str(bin))
    assert here.count(str(bin)) == 2
    log = folder / "init.log"  # as on Databricks a file: a pipe would not end before what was started ends
    with log.open("wb") as file:
        done = subprocess.run(["bash", "-c", here], env=os.environ | environment, stdout=file, stderr=file, timeout=60)
    assert done.returncode == 0, log.read_text()
    return log.read_text()


@contextmanager
def databricks_driver() -> Iterator[Client]:
    """What runs on a driver node: the scheduler."""
    cluster = LocalCluster(
        n_workers=0, processes=False, host=DRIVER, scheduler_port=8786, protocol="tcp://",
        dashboard_address=f"{DRIVER}:8087",
    )  # fmt: skip
    with cluster, Client(cluster, set_as_default=False) as client:
        yield client


@needs_terraform
def test_a_worker_node_joins_the_drivers_scheduler_by_the_init_script(init_script: str, tmp_path: Path) -> None:
    # Without a GPU the worker is dask's own, and that is the only thing changed in the command.
    bin = Path(sys.executable).parent
    without_cuda = '"${@/--cuda/--worker-command=dask worker}"'
    programs = {"pip": ":", "dask": f'export PATH="{bin}:$PATH"\nexec "{bin}/dask" {without_cuda}'}
    with databricks_driver() as client:
        before = children()
        run_script(init_script, tmp_path, programs, DB_IS_DRIVER="FALSE", DB_DRIVER_IP=DRIVER)
        try:
            client.wait_for_workers(1, timeout=30)  # it goes on after its script has ended
            assert list(client.nthreads().values()) == [2]
        finally:
            for number in children() - before:
                os.kill(number, signal.SIGKILL)


def children() -> set[int]:
    """Processes that were started for this scheduler."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"tcp://{DRIVER}:8786".encode() in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


def job_script(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    script = DEPLOY / "databricks-aws" / "job" / "embed.py"
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_jobs_script_embeds_on_the_cluster_beside_it(tmp_path: Path, wheel_photos: list[Path]) -> None:
    data = write_dataset(tmp_path / "data", wheel_photos, shards=2, samples=3)
    environment = {"SPARK_LOCAL_IP": DRIVER, "MASTER": ""}
    with databricks_driver() as client, LocalWorker():
        client.wait_for_workers(1, timeout=30)
        done = job_script(
            "columns", data, "--output", tmp_path / "out", "--hash", "phash", "--json",
            "--cluster", DEPLOY / "databricks-aws" / "job" / "cluster.yaml", **environment,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["read"] == 8


class LocalWorker:
    """A worker of the driver's scheduler, as a process."""

    def __enter__(self) -> None:
        command = [str(Path(sys.executable).with_name("dask")), "worker", "--nthreads", "2", f"tcp://{DRIVER}:8786"]
        self.process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(REPO)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)


def test_the_jobs_script_fails_by_an_exception_and_succeeds_without_a_system_exit() -> None:
    assert job_script("--version").returncode == 0
    wrong = job_script("embed", "/no/such/dataset", "--model", "ViT-B/32", "--output", "/no/such/folder")
    assert wrong.returncode == 1
    assert "RuntimeError: curator-embed ended with exit status" in wrong.stderr


def test_the_jobs_cluster_file_is_for_databricks() -> None:
    config = read_cluster(DEPLOY / "databricks-aws" / "job" / "cluster.yaml")
    assert isinstance(config, DatabricksConfig) and config.gpus_per_node == 1
    assert isinstance(read_cluster(REPO / "examples" / "clusters" / "databricks.yaml"), DatabricksConfig)


@needs_terraform
def test_an_instances_script_runs_the_command_with_each_argument_as_it_is(plan: Any, tmp_path: Path) -> None:
    text = hcl(DEPLOY / "aws-ec2")
    quoting = re.search(r"^\s*command = (.*)$", text, re.M)
    assert quoting is not None
    arguments = ["embed", "s3://b/it's {00..09}.tar", "$HOME", "`id`", 'a "b"', "--quiet"]
    expression = quoting[1].replace("local.arguments", json.dumps(arguments).replace("${", "$${"))
    folder = plan("aws-ec2", f'''output "script" {{
  value = templatefile("${{path.module}}/user_data.sh.tftpl", {{
    wheel_url = "s3://b/{WHEEL}", wheel = "{WHEEL}", log_url = "s3://b/log", command = {expression}
  }})
}}
''')  # fmt: skip
    script = rendered(folder)
    assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=10).returncode == 0
    command = script.strip().splitlines()[-1].split(" ", 1)[1]
    seen = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, timeout=10)
    assert seen.stdout.splitlines() == arguments


def documents() -> dict[str, dict[str, Any]]:
    """The resources of run.yaml by their kind."""
    loaded = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "run.yaml").read_text()))
    return {document["kind"]: document for document in loaded}


@pytest.fixture
def run_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KubernetesConfig:
    """The cluster of run.yaml, as the driver's pod reads it."""
    monkeypatch.setenv("POD_NAME", "embed-x7k2p")
    monkeypatch.setenv("POD_UID", "0d2c")
    path = tmp_path / "cluster.yaml"
    path.write_text(documents()["ConfigMap"]["data"]["cluster.yaml"])
    config = read_cluster(path)
    assert isinstance(config, KubernetesConfig)
    return config


def test_the_resources_of_a_run_name_each_other(run_config: KubernetesConfig) -> None:
    kinds = documents()
    assert set(kinds) == {"Namespace", "ServiceAccount", "Role", "RoleBinding", "ConfigMap", "Job"}
    place = kinds["Namespace"]["metadata"]["name"]
    for kind, document in kinds.items():
        assert kind == "Namespace" or document["metadata"]["namespace"] == place
    account = kinds["ServiceAccount"]["metadata"]["name"]
    pod = kinds["Job"]["spec"]["template"]["spec"]
    assert kinds["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": place}]
    assert kinds["RoleBinding"]["roleRef"]["name"] == kinds["Role"]["metadata"]["name"]
    assert pod["serviceAccountName"] == account == run_config.service_account
    [driver] = pod["containers"]
    assert driver["image"] == run_config.image  # one image: versions that agree
    assert pod["volumes"] == [{"name": "cluster", "configMap": {"name": kinds["ConfigMap"]["metadata"]["name"]}}]
    [mount] = driver["volumeMounts"]
    assert f"--cluster={mount['mountPath']}/cluster.yaml" in driver["args"]
    assert run_config.name == "embed-x7k2p"
    # Each variable of the cluster's file is the driver pod's own.
    fields = {variable["name"]: variable["valueFrom"]["fieldRef"]["fieldPath"] for variable in driver["env"]}
    assert fields == {"POD_NAME": "metadata.name", "POD_UID": "metadata.uid"}
    assert run_config.owner == {"apiVersion": "v1", "kind": "Pod", "name": "embed-x7k2p", "uid": "0d2c"}


@pytest.mark.parametrize("where", ["job", "ec2", "kubernetes"])
def test_the_command_has_every_option_that_the_files_give_it(where: str) -> None:
    from typer.testing import CliRunner

    from curator_embed.cli.main import app

    if where == "kubernetes":
        [driver] = documents()["Job"]["spec"]["template"]["spec"]["containers"]
        assert driver["args"][:2] == ["curator-embed", "embed"]
        options = {argument.split("=")[0] for argument in driver["args"] if argument.startswith("--")}
    else:
        folder = {"job": "databricks-aws/job", "ec2": "aws-ec2"}[where]
        options = set(re.findall(r'"(--[a-z-]+)"', hcl(DEPLOY / folder)))
    assert {"--output", "--model", "--pretrained"} < options
    shown = CliRunner().invoke(app, ["embed", "--help"], env={"COLUMNS": "200"}).output
    options -= {"--nthreads"}  # dask's
    assert {option for option in options if not re.search(rf"{option}\b", shown)} == set()


def test_the_role_allows_each_request_of_a_run_and_of_one_that_does_not_start(
    run_config: KubernetesConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from curator_embed.errors import CuratorEmbedError

    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    asked: set[tuple[str, str, str]] = set()
    small = replace(run_config, gpus_per_node=0, nodes=1, memory="1Gi", service_type="LoadBalancer", wait_seconds=60)
    kubernetes = Kubernetes(asked=asked)
    with serving(kubernetes, tmp_path / "kubeconfig"):
        small.start().close()
    with (
        serving(Kubernetes(asked=asked, stuck={"waiting": {"reason": "ErrImagePull"}}), tmp_path / "kubeconfig"),
        pytest.raises(CuratorEmbedError),
    ):
        replace(small, wait_seconds=2).start()
    allowed = {
        (verb, group, resource)
        for rule in documents()["Role"]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert ("create", "kubernetes.dask.org", "daskclusters") in asked
    assert asked <= allowed, asked - allowed


def test_the_image_copies_what_is_there_and_the_build_sees() -> None:
    folder = DEPLOY / "kubernetes"
    sources = [
        source for line in re.findall(r"^COPY (.+)$", (folder / "Dockerfile").read_text(), re.M)
        for source in line.split()[:-1]
    ]  # fmt: skip
    let_through = re.findall(r"^!(.+)$", (folder / "Dockerfile.dockerignore").read_text(), re.M)
    assert sources and sorted(sources) == sorted(let_through)
    assert all((REPO / source).exists() for source in sources)
    extras = re.search(r"^ARG EXTRAS=(.+)$", (folder / "Dockerfile").read_text(), re.M)
    project = (REPO / "pyproject.toml").read_text()
    assert extras is not None
    assert all(re.search(rf"^{extra} = \[", project, re.M) for extra in extras[1].split(","))
