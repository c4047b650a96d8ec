"""Triton's interpreter, for tests of kernels where there is no GPU. Import before any kernel.

Where there is a GPU the tests run on it, and nothing is changed.
"""

from __future__ import annotations

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _index_like_numpy() -> None:
    """Triton 3.6 makes loop bounds of arrays in a way that numpy 2.4 and later refuse."""
    import triton.runtime.interpreter as interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: object, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = mended


if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    _index_like_numpy()
