"""The Dask cluster that runs beside Spark on a Databricks cluster.

Nothing is started here: the nodes' init script starts the scheduler on the driver and the workers on the others
(examples/deploy/databricks-aws). This connects to them, and says what is missing where they are not.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

from curator_embed.errors import CuratorEmbedError, MissingExtra, UsageError
from curator_embed.execution.clusters.config import ClusterConfig

SCHEDULER_PORT = 8786
"""Where ``dask databricks run`` starts the scheduler."""

_SET_ELSEWHERE = {
    "nodes": "the Databricks cluster's own settings say how many workers it has",
    "workers_per_node": 'the init script says so: dask databricks run --worker-args \'["--nworkers", "2"]\'',
    "threads_per_worker": 'the init script says so: dask databricks run --worker-args \'["--nthreads", "2"]\'',
    "options": "dask_databricks.DatabricksCluster has none",
}


@dataclass(frozen=True, kw_only=True)
class DatabricksConfig(ClusterConfig):
    """The Dask cluster of the Databricks cluster whose driver node this process runs on.

    Of the keys that all kinds have, ``wait_for_workers``, ``wait_seconds`` and ``gpus_per_node`` (more than 0: workers
    have GPUs, and data frames are cuDF's) mean something here. The size is the Databricks cluster's.
    """

    kind: ClassVar[str] = "databricks"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, where in _SET_ELSEWHERE.items():
            if getattr(self, key) != getattr(ClusterConfig(), key):
                raise self.wrong(key, f"it has no effect here: {where}. Remove the line")

    def check(self) -> None:
        """See ``ClusterConfig.check``: whether this is a Databricks driver node."""
        if "SPARK_LOCAL_IP" not in os.environ:
            raise UsageError(
                f"{self.path}: cluster: databricks works on the driver node of a Databricks cluster, in a notebook or "
                "a job; here SPARK_LOCAL_IP is not set. Elsewhere use another kind of cluster"
            )

    def start(self) -> Any:
        """Connect to the scheduler on this node.

        Returns:
            A ``dask_databricks.DatabricksCluster``; closing it leaves the Databricks cluster as it is.
        """
        self.check()
        address = os.environ["SPARK_LOCAL_IP"]
        _begin_spark_session()
        try:
            from dask_databricks import DatabricksCluster
        except ImportError as error:
            raise MissingExtra("dask-databricks", "databricks", f"{self.path}: cluster: databricks") from error
        try:
            return DatabricksCluster()
        except (OSError, TimeoutError) as error:
            if "local[" in os.environ.get("MASTER", ""):
                raise UsageError(
                    f"{self.path}: this Databricks cluster has a single node, so no Dask workers. Use 'cluster: local' "
                    "with 'gpus_per_node', or give it workers"
                ) from error
            raise CuratorEmbedError(
                f"{self.path}: no Dask scheduler answers at {address}:{SCHEDULER_PORT} "
                f"({error}). The cluster's init script starts it with 'dask databricks run': see that it is set, and "
                "its log in the folder init_scripts of the cluster's logs"
            ) from error

    def where_to_look(self) -> str:
        return (
            "the init script's log on each worker node (folder init_scripts of the cluster's logs), and at the event "
            "log of the Databricks cluster for nodes that it could not get"
        )


def _begin_spark_session() -> None:
    """dask-databricks looks up the cluster's name and the dashboard's address in the session that is active when it
    is imported. A notebook has one; a job's script has none before it asks."""
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        return
    SparkSession.builder.getOrCreate()
