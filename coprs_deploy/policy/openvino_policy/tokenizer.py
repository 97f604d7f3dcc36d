"""Tokenizer of a policy directory, read from ``tokenizer.json`` without transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coprs_deploy.errors import PolicyError, import_failure, install_hint

TOKENIZER_FILE = "tokenizer.json"


class FileTokenizer:
    """The part of a transformers tokenizer that prompts and responses use.

    Args:
        path: directory that contains ``tokenizer.json``.
        eos_token_id: end token; None if the policy has none of its own.

    Raises:
        MissingDependencyError: the package tokenizers is not installed.
        PolicyError: the file is missing or is not a tokenizer.
    """

    unk_token_id = None

    def __init__(self, path: Path, eos_token_id: int | None) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            hint = install_hint("edge")
            raise import_failure(error, "", hint, needed_by="the openvino policy") from error
        file = path / TOKENIZER_FILE
        try:
            self.backend_tokenizer: Any = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except MemoryError:
            raise
        except Exception as error:  # the library raises the class Exception itself
            raise PolicyError(f"{file} cannot be loaded as a tokenizer: {error}") from error
        self.eos_token_id = eos_token_id

    def __call__(self, text: str, **options: Any) -> Mapping[str, list[int]]:
        """Return the ``input_ids`` of ``text``; the option is ``add_special_tokens``."""
        return {"input_ids": self.backend_tokenizer.encode(text, **options).ids}

    def get_added_vocab(self) -> dict[str, int]:
        """Return the ids of the added tokens by their content."""
        added = self.backend_tokenizer.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items()}

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """Return the id of a token; None if there is no such token."""
        index: int | None = self.backend_tokenizer.token_to_id(token)
        return index

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        text: str = self.backend_tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens
        )
        return text
