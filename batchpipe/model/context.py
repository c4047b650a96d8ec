"""The longest context of a model: from its configuration, or as the job sets it."""

from __future__ import annotations

import logging
from typing import Any

from batchpipe.errors import JobError

logger = logging.getLogger(__name__)

# They change the angles of every token once one passes the trained length, so rows of a batch would touch each other.
_INEXACT_BEYOND = {"longrope", "dynamic"}


def max_context_tokens(config: Any, wanted_tokens: int | None = None) -> int:
    """Prompt and completion together. `wanted_tokens` is model.max_context_tokens, which takes precedence.

    `config` is the model's configuration in transformers. `linear` and `yarn` scaling make the context longer than
    max_position_embeddings where that is the length before scaling. `longrope` and `dynamic` models are held to the
    length that they were trained for, within which they are exact; JobError if the job asks for more of these.
    """
    limit: int = config.max_position_embeddings
    parameters = getattr(config, "rope_parameters", None) or {}
    # Models with two kinds of layers have one set of parameters for each, and name the length after scaling.
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    inexact = None
    for rope in nested or [parameters]:
        kind, factor = rope.get("rope_type"), rope.get("factor") or 1.0
        trained = rope.get("original_max_position_embeddings") or limit
        if kind in _INEXACT_BEYOND:
            limit, inexact = min(limit, trained), kind
        elif kind == "yarn" or (kind == "linear" and not nested):
            limit = max(limit, int(trained * factor))
    if wanted_tokens is None:
        return limit
    if wanted_tokens > limit and inexact is not None:
        raise JobError(
            f"model.max_context_tokens: {wanted_tokens:,} is more than {limit:,}, beyond which the model's {inexact} "
            "scaling would let rows change each other's tokens"
        )
    if wanted_tokens > limit:
        logger.warning(
            "model.max_context_tokens: %s is more than the %s tokens that the model names; longer rows may be poor",
            *(f"{wanted_tokens:,}", f"{limit:,}"),
        )
    return wanted_tokens
