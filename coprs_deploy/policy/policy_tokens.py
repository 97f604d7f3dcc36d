"""Tokenizer of a policy directory, its special tokens, and incremental detokenization."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from coprs_deploy.errors import PolicyError
from coprs_deploy.prompts import REFERENCE_TOKEN, Response, read_response


class PolicyTokens:
    """Tokenizer, ``<REF_POS>`` and end tokens of a policy.

    Args:
        path: policy directory.
        configured_end_ids: ``eos_token_id`` of the generation config.

    Attributes:
        tokenizer: tokenizer of transformers.
        reference_id: id of ``<REF_POS>``.
        end_ids: ids of the tokens that end a response; at least one.

    Raises:
        PolicyError: the tokenizer cannot be loaded, or lacks ``<REF_POS>`` or an end token.
    """

    def __init__(self, path: Path, configured_end_ids: int | Sequence[int] | None) -> None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise PolicyError(f"{path} cannot be loaded as a policy: {error}") from error
        reference_id = tokenizer.convert_tokens_to_ids(REFERENCE_TOKEN)
        if reference_id is None or reference_id == tokenizer.unk_token_id:
            raise PolicyError(
                f"the tokenizer in {path} has no {REFERENCE_TOKEN}; `coprs-deploy convert` adds it"
            )
        self.tokenizer: Any = tokenizer
        self.reference_id: int = reference_id
        if not isinstance(configured_end_ids, Sequence):
            configured_end_ids = [configured_end_ids] if configured_end_ids is not None else []
        self.end_ids = frozenset({tokenizer.eos_token_id, *configured_end_ids} - {None})
        if not self.end_ids:
            raise PolicyError(
                f"{path} has no end token; set eos_token_id in its generation config or tokenizer"
            )

    def read(self, token_ids: Sequence[int]) -> Response:
        """Parse a response from its token ids."""
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        return read_response(list(token_ids), self.reference_id, decode)


class TextStream:
    """Incremental text of a response; a character of several tokens is returned whole."""

    def __init__(self, tokens: PolicyTokens) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokens = tokens
        self._pieces = DecodeStream(skip_special_tokens=True)
        self._num_characters = 0

    def add(self, token: int) -> str:
        """Return the text that a token adds; empty inside a character."""
        if token == self._tokens.reference_id:
            text: str | None = REFERENCE_TOKEN
        else:
            text = self._pieces.step(self._tokens.tokenizer.backend_tokenizer, token)
        self._num_characters += len(text or "")
        return text or ""

    def rest(self, response: Response) -> str:
        """Return the text of the response that no token has added yet: an incomplete character."""
        return response.text[self._num_characters :]
