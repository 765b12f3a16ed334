"""Clusters described by a YAML file: what it says, and what each kind of cluster makes of it.

``read_cluster`` gives the config, ``config.start()`` the running cluster that ``get_client`` connects to.
"""

from curator_embed.execution.clusters.config import ClusterConfig, read_cluster

__all__ = ["ClusterConfig", "read_cluster"]
