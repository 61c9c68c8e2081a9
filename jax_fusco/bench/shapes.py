"""The Mixture-of-Experts layers that the benchmark takes its sizes from.

Hidden size, experts, experts per token and expert hidden size are those of the published models'
configurations.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """One model's MoE layer, and the tokens (over all ranks) that the benchmark gives it."""

    name: str
    features: int
    experts: int
    k: int
    expert_features: int
    tokens: int


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b-a3b", 2048, 128, 8, 768, 8192),
        Shape("deepseek-v3", 7168, 256, 8, 2048, 2048),
        Shape("mixtral-8x7b", 4096, 8, 2, 14336, 8192),
        Shape("gpt-oss-20b", 2880, 32, 4, 2880, 8192),
        Shape("gpt-oss-120b", 2880, 128, 4, 2880, 8192),
        Shape("olmoe-1b-7b", 2048, 64, 8, 1024, 8192),
        Shape("qwen3-235b-a22b", 4096, 128, 8, 1536, 4096),
        Shape("kimi-k2", 7168, 384, 8, 2048, 2048),
    )
}
