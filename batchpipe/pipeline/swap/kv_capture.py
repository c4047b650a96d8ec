"""An attention backend that passes every layer's new KV on before it computes, and tells when it has computed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from batchpipe.attention.base import AttentionBackend, AttentionInputs, AttentionOptions


class KvCapture:
    """See `AttentionBackend`.

    before: called with the layer and its new tokens' key and value [T, Hkv, D]. after: called with the layer.
    """

    def __init__(
        self, backend: AttentionBackend, before: Callable[[int, Tensor, Tensor], None], after: Callable[[int], None]
    ) -> None:
        self.name = backend.name
        self.default_block_tokens = backend.default_block_tokens
        self._backend = backend
        self._before = before
        self._after = after

    def forward(
        self, inputs: AttentionInputs, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        self._before(layer, key, value)
        attended = self._backend.forward(inputs, layer, query, key, value, options)
        self._after(layer)
        return attended
