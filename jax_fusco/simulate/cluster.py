"""A cluster: its size and the five constants of its links."""

from __future__ import annotations

import dataclasses

CONSTANTS = ("nvlink", "nic", "copy", "nvlink_latency", "nic_latency")
"""What may be fitted: one number each, for all routings, lengths and ways."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """N nodes of GPUs; bandwidths in GB/s in each direction, latencies in microseconds.

    Attributes:
      nodes, gpus_per_node: N and L.
      nics_per_node: shared evenly by the GPUs of a node.
      oversubscription: bandwidth of all NICs over that of the network's core.
      nvlink: of one GPU to its node.
      nic: of one NIC.
      copy: bytes read plus bytes written of a GPU's own memory.
      nvlink_latency, nic_latency: for each peer that a GPU exchanges a message with, in turn.
    """

    nodes: int
    gpus_per_node: int = 8
    nics_per_node: int = 8
    oversubscription: float = 1.0
    nvlink: float = 480.0
    nic: float = 50.0
    copy: float = 2000.0
    nvlink_latency: float = 5.0
    nic_latency: float = 10.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            whole = field.name in ("nodes", "gpus_per_node", "nics_per_node")
            least = 1 if whole or field.name == "oversubscription" else 0
            if not value >= least or (value == 0 and not field.name.endswith("latency")):
                raise ValueError(f"{field.name}: got {value}, need at least 1 or more than 0")

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


FUSCO_CLUSTER = Cluster(nodes=8, gpus_per_node=8, nics_per_node=10)
"""Eight servers of eight H100s and ten NICs (arXiv 2512.22036); the constants are nominal."""
