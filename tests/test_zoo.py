"""A dozen families of the coverage benchmark's zoo: verified, smaller, and they run."""

from __future__ import annotations

import pytest

from benchmarks.one_model import SMALLER, measure
from benchmarks.zoo import find

FAMILIES = (
    "torchvision/shufflenet_v2_x0_5", "torchvision/mobilenet_v3_small", "torchvision/squeezenet1_1",
    "timm/ghostnet_050", "timm/mobilevit_xxs", "timm/pvt_v2_b0", "timm/edgenext_xx_small", "timm/nf_regnet_b0",
    "transformers/bert", "transformers/llama", "transformers/t5", "transformers/swin", "transformers/detr",
    "transformers/mixtral",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_counts(name: str) -> None:
    row = measure(find(name), "ours", 240)
    assert row["verified"], row["reason"]
    assert row["ratio"] >= SMALLER
    assert all(row["runs"].values()), row["runs"]  # batch 1 and 3, the original's shapes, backward
    assert row["macs_after"] < row["macs_before"]
