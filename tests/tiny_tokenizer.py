"""A tokenizer of a few hundred tokens, made in a moment: byte-level BPE, so that it has tokens for any text."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "user assistant system what is the capital of France",
]


def build_tiny_tokenizer(
    folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, adds_begin_token: bool = False
) -> Path:
    """Writes the tokenizer to `folder`, which it returns. Tokens 0, 1, 2 are <|begin|>, <|start|> and <|end|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in ("<|begin|>", "<|start|>", "<|end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    if adds_begin_token:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|start|>"],
    )
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(folder)
    return folder
