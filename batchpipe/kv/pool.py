"""One stage's KV memory on its device or, for the second tier, on the host.

It is a single tensor with the block as its first dimension, so that copying a block of all layers is one contiguous
copy.

data [num_blocks, num_layers, 2, num_kv_heads, block_tokens, head_dim]

         block 0                    block 1
┌─────────┬─────────┬──   ┌─────────┬─────────┬──      within a layer: K of head 0, K of head 1, ...,
│ layer 0 │ layer 1 │     │ layer 0 │ layer 1 │        V of head 0, ...; each `block_tokens` rows
└─────────┴─────────┴──   └─────────┴─────────┴──      of `head_dim` numbers, row-major
"""

from __future__ import annotations

import mmap
import resource
from contextlib import suppress

import torch

from batchpipe.errors import MemoryLimitError
from batchpipe.kv.layout import KvLayout
from batchpipe.types import Int32Array

KEY, VALUE = 0, 1
INTEGERS = {2: torch.int16, 4: torch.int32}  # by item size, for the bits of KV: numpy has no bfloat16
READY_BYTES = 2 << 30
_MADV_POPULATE_WRITE = 23  # Linux 5.14


class KvPool:
    """The blocks of one stage's layers, which all have the same heads. Zeros at first, because kernels read whole rows.

    Host memory gets its pages when a block is first written, so a large pool is made at once; huge pages are asked for
    if the system offers them. The first blocks, which every job uses, get their pages at once: in a virtual machine
    that may take a second per gigabyte, which must not count as time of a step.

    pinned: host memory that a GPU reads and writes by itself, until `unpin`; it gets all its pages at once.
    asked_by: the job's key that a MemoryLimitError names if the system refuses the memory.
    """

    def __init__(
        self,
        num_blocks: int,
        num_layers: int,
        num_kv_heads: int,
        block_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        pinned: bool = False,
        asked_by: str = "engine.kv_device_memory",
    ) -> None:
        layout = KvLayout(num_kv_heads, head_dim, dtype.itemsize, block_tokens)
        shape = layout.pool_shape(num_blocks, num_layers)
        assert all(size > 0 for size in shape), f"a KV pool needs at least one of each dimension, not {shape}"
        self.num_blocks = num_blocks
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.block_tokens = block_tokens
        self.head_dim = head_dim
        self.dtype = dtype
        self.bytes_per_block = layout.block_bytes(num_layers)
        self.device = torch.device(device)
        if self.device.type == "cpu":
            pages = _zero_pages(num_blocks * self.bytes_per_block, asked_by)
            if pinned:
                _pin(pages, asked_by)
            self.data = pages.view(dtype).view(shape)
        else:
            try:
                self.data = torch.zeros(shape, dtype=dtype, device=self.device)
            except torch.OutOfMemoryError as error:
                raise MemoryLimitError(
                    f"{asked_by}: {self.device} refuses {num_blocks * self.bytes_per_block / 2**30:.1f} GiB for KV; "
                    f"set a lower value ({str(error).splitlines()[0]})"
                ) from None

    def copy_blocks(self, sources: Int32Array, targets: Int32Array) -> None:
        """Copies all layers of block sources[i] to block targets[i]; no block is both."""
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self.data[target].copy_(self.data[source])

    def unpin(self) -> None:
        """Call once on a pinned pool, when no GPU uses it any more and before its memory is freed."""
        error = torch.cuda.cudart().cudaHostUnregister(self.data.data_ptr())
        assert int(error) == 0, f"cudaHostUnregister: {error}"


def _zero_pages(num_bytes: int, asked_by: str) -> torch.Tensor:
    """uint8 [num_bytes] of anonymous memory, which the tensor keeps alive."""
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryLimitError(
            f"{asked_by}: the system refuses {num_bytes / 2**30:.1f} GiB for KV; set a lower value"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    with suppress(OSError):  # an older kernel: pages come when they are first written
        pages.madvise(_MADV_POPULATE_WRITE, 0, min(num_bytes, READY_BYTES))
    return torch.frombuffer(pages, dtype=torch.uint8)


def _pin(pages: torch.Tensor, asked_by: str) -> None:
    """Pins in place, because torch rounds pinned memory up to powers of two, to twice the bytes at worst."""
    error = torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), pages.nbytes, 0)
    if int(error) != 0:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        limited = "" if limit == resource.RLIM_INFINITY else f" (`ulimit -l` is {limit / 2**30:.1f} GiB)"
        raise MemoryLimitError(
            f"{asked_by}: the system refuses to lock {pages.nbytes / 2**30:.1f} GiB in memory{limited}; "
            "set a lower value or raise the limit"
        )
