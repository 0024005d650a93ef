"""The tokenizer of the small checkpoint: one token a word, unknown words one token each.

Knows which ids share an embedding, and how captions become ids. Knows
no model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import T5Tokenizer

from helios_serve.model_executor.tiny_tokenizer import SPECIAL_TOKENS, WORD_START, write_unigram
from tools.tiny_checkpoint.captions import PLAIN_WORDS, PUNCTUATION, SYNONYMS

_UNKNOWN = 2
_ROOM = 32
"""Ids of a row of `Vocabulary.tokens`, if its captions are no longer: one width, so that nothing is compiled twice."""


def write_vocabulary(folder: Path) -> int:
    """Writes tokenizer.json and tokenizer_config.json into `folder`; returns the number of ids."""
    entries = [*((token, 0.0) for token in SPECIAL_TOKENS), (WORD_START, -8.0)]
    entries += [(token, -6.0) for token, _ in _words()]
    return write_unigram(folder, entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A tokenizer and, for each of its ids, the one whose embedding it has."""

    tokenizer: T5Tokenizer
    canonical: tuple[int, ...]

    @classmethod
    def new(cls) -> Vocabulary:
        """That of the small checkpoint."""
        with tempfile.TemporaryDirectory() as folder:
            write_vocabulary(Path(folder))
            tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
        return cls(tokenizer=tokenizer, canonical=tuple(_canonical_ids()))

    @property
    def size(self) -> int:
        return len(self.canonical)

    def tokens(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Canonical ids [B, L], padded with 0 to a width that hardly ever changes, and their numbers [B]."""
        rows = [[self.canonical[token] for token in ids] for ids in self.tokenizer(list(captions))["input_ids"]]
        width = max(_ROOM, *(len(row) for row in rows))
        return torch.tensor([row + [0] * (width - len(row)) for row in rows]), torch.tensor([len(row) for row in rows])


def _canonical_ids() -> list[int]:
    """For each id the one whose embedding it has: synonyms and capitals have that of the plain word, and the bare
    start of a word that of an unknown one."""
    first = len(SPECIAL_TOKENS) + 1
    place = {token: first + index for index, (token, _) in enumerate(_words())}
    return [*range(len(SPECIAL_TOKENS)), _UNKNOWN, *(place[plain] for _, plain in _words())]


def _words() -> list[tuple[str, str]]:
    """Every token of a word or sign, with the token whose meaning it has."""
    meaning: dict[str, str] = {sign: sign for sign in PUNCTUATION}
    for word in PLAIN_WORDS:
        for spelled in (word, *SYNONYMS.get(word, ())):
            for form in (spelled, spelled.capitalize(), spelled.upper()):
                meaning.setdefault(WORD_START + form, WORD_START + word)
    return list(meaning.items())
