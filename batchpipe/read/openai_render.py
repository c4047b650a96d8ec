"""The prompts of OpenAI's requests: messages through the model's chat template, a completion's prompt as it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchpipe.errors import RowError
from batchpipe.job.spec import InputSpec
from batchpipe.model.tokenizer import Tokenizer
from batchpipe.read.openai_body import MESSAGES, PROMPT
from batchpipe.read.render import Renderer
from batchpipe.types import ErrorCode


class RequestRenderer(Renderer):
    """A `Renderer` of the rows that `read.openai_body` makes. Without a chat template only completions can be rendered.

    `input.system` goes before the messages of a chat that has no system message.
    """

    def __init__(self, spec: InputSpec, tokenizer: Tokenizer) -> None:
        chat = {"messages_column": MESSAGES}
        plain = {"prompt_column": PROMPT, "chat_template": "none", "system": None}
        has_template = spec.chat_template != "auto" or tokenizer.has_chat_template
        self._can_chat = has_template and spec.chat_template != "none"
        super().__init__(spec.model_copy(update=chat if self._can_chat else plain), tokenizer)
        self._plain = Renderer(spec.model_copy(update=plain), tokenizer)

    def render(self, values: Mapping[str, Any]) -> str | list[int]:
        if MESSAGES not in values:
            prompt = self._plain.render(values)
            # `encode` is that of chats, so a completion's prompt is encoded here.
            return self._plain.encode([prompt])[0] if isinstance(prompt, str) else prompt
        if not self._can_chat:
            message = "body.messages: needs a chat template, and the model has none; give one as input.chat_template"
            raise RowError(ErrorCode.TEMPLATE_ERROR, message)
        return super().render(values)
