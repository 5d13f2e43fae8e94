"""The model's tokenizer: text to ids, chat to ids, ids to text, whole or piece by piece.

Does not know requests or the engine. Invariant: only methods of the tokenizer that do not change it are called, so
the event loop and the engine's thread may use one `Text` at the same time.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from firebox.wire.errors import FailedPrecondition, InvalidArgument


class Text:
    """Loads the tokenizer of `model_dir`; raises FailedPrecondition when it has no fast one (tokenizer.json)."""

    def __init__(self, model_dir: Path) -> None:
        self._hf = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        if not getattr(self._hf, "is_fast", False):
            raise FailedPrecondition(
                f"{model_dir.name}: a tokenizer.json is needed; save the model with its fast tokenizer",
                reason="UNSUPPORTED_TOKENIZER",
            )
        self._fast: Tokenizer = self._hf.backend_tokenizer
        self.eos_ids = _eos_ids(model_dir) | {self._hf.eos_token_id} - {None}
        self.piece = functools.lru_cache(maxsize=65536)(self._piece)

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the tokenizer's own leading tokens."""
        return self._fast.encode(text).ids

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn; InvalidArgument if the template refuses."""
        if not self._hf.chat_template:
            raise InvalidArgument("messages: this model has no chat template; use /v1/completions with a prompt")
        try:
            text = self._hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise InvalidArgument(f"messages: refused by the model's chat template: {error}") from error
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text for people: special tokens are left out."""
        return self._fast.decode(ids, skip_special_tokens=True)

    def decode_raw(self, ids: Sequence[int]) -> str:
        """Text with special tokens spelled out, as stop strings may name them."""
        return self._fast.decode(ids, skip_special_tokens=False)

    def _piece(self, token: int) -> str:
        return self.decode_raw([token])

    def stream(self) -> TextStream:
        return TextStream(self._fast)


class TextStream:
    """Decodes one sequence token by token; holds back what is not yet a whole character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)

    def push(self, ids: Sequence[int]) -> str:
        return "".join(self._decoder.step(self._tokenizer, token) or "" for token in ids)


def _eos_ids(model_dir: Path) -> set[int]:
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        value = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return found
