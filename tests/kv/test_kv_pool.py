import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from batchpipe.errors import MemoryLimitError
from batchpipe.kv.pool import KEY, VALUE, KvPool


def test_shape_and_sizes() -> None:
    pool = KvPool(5, 3, 2, 16, 8, torch.bfloat16)
    assert pool.data.shape == (5, 3, 2, 2, 16, 8)
    assert pool.data.is_contiguous()
    assert pool.bytes_per_block == 3 * 2 * 2 * 16 * 8 * 2
    assert 5 * pool.bytes_per_block == pool.data.numel() * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_starts_as_zeros_and_is_writable(dtype: torch.dtype) -> None:
    pool = KvPool(4, 1, 1, 16, 16, dtype)
    assert not pool.data.any()
    pool.data[2, 0, KEY] = 1
    pool.data[2, 0, VALUE] = 2
    assert pool.data.float().sum() == 16 * 16 * 3


def test_memory_lives_as_long_as_a_view() -> None:
    row = KvPool(4, 2, 2, 16, 16, torch.float32).data[3, 1, VALUE, 1, 15]
    row += 7
    assert row.tolist() == [7.0] * 16


def test_more_than_the_system_gives_is_named() -> None:
    with pytest.raises(MemoryLimitError, match=r"engine.kv_device_memory: .* 1474560.0 GiB for KV; set a lower"):
        KvPool(1 << 30, 30, 3, 64, 64, torch.bfloat16)
    with pytest.raises(MemoryLimitError, match=r"engine.kv_host_memory: .* 1474560.0 GiB"):
        KvPool(1 << 30, 30, 3, 64, 64, torch.bfloat16, asked_by="engine.kv_host_memory")


def test_memory_that_cannot_be_pinned_is_named_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = SimpleNamespace(cudaHostRegister=lambda pointer, num_bytes, flags: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1 << 30, 1 << 30))
    with pytest.raises(MemoryLimitError, match=r"engine.kv_host_memory: .* lock 1.5 GiB .*`ulimit -l` is 1.0 GiB"):
        KvPool(1 << 19, 1, 2, 12, 64, torch.bool, pinned=True, asked_by="engine.kv_host_memory")


def test_nothing_of_a_kind_is_refused() -> None:
    with pytest.raises(AssertionError, match="at least one"):
        KvPool(0, 1, 1, 16, 16, torch.float32)


def test_a_copied_block_is_the_same_in_every_layer() -> None:
    pool = KvPool(4, 3, 2, 4, 16, torch.float32)
    pool.data.normal_(generator=torch.Generator().manual_seed(0))
    before = pool.data.clone()
    pool.copy_blocks(np.array([0, 1], np.int32), np.array([3, 2], np.int32))
    assert torch.equal(pool.data, before[[0, 1, 1, 0]])
