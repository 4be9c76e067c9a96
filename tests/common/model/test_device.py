"""What a server tells of the device it computes on."""

import pytest
import torch

from common.model.device import export_memory
from common.service import metrics


def told() -> dict[str, float]:
    (family,) = metrics.GPU_MEMORY_BYTES.collect()
    return {sample.labels["kind"]: sample.value for sample in family.samples}


@pytest.mark.parametrize(("device", "kinds"), [("cpu", set()), ("cuda", {"allocated", "reserved"})])
def test_a_gpu_has_memory_to_tell_of(device, kinds):
    """torch counts nothing where there is no GPU."""
    metrics.GPU_MEMORY_BYTES.clear()
    export_memory(torch.device(device))
    assert told().keys() == kinds
    assert all(value >= 0 for value in told().values())
    metrics.GPU_MEMORY_BYTES.clear()
