"""Where the tests of a GPU's kernels run: on the GPU, or in Triton's interpreter where there is none.

Import before any kernel. The tests' conftest asks for the interpreter, before anything can import Triton.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="no Triton here")

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
    _index_like_numpy()
