"""The tokenizer of the small checkpoint: one token a word, unknown words one token each.

Knows the tokenizer's file format, which ids share an embedding, and how captions become ids. Knows
no model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import Tensor
from transformers import T5Tokenizer

from tools.tiny_checkpoint.captions import PLAIN_WORDS, PUNCTUATION, SYNONYMS

_SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
_WORD_START = "▁"
_UNKNOWN = 2


def write_vocabulary(folder: Path) -> int:
    """Writes tokenizer.json and tokenizer_config.json into `folder`; returns the number of ids."""
    entries = [*((token, 0.0) for token in _SPECIAL_TOKENS), (_WORD_START, -8.0)]
    entries += [(token, -6.0) for token, _ in _words()]
    tokenizer = Tokenizer(Unigram(entries, unk_id=_UNKNOWN, byte_fallback=False))
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement=_WORD_START, prepend_scheme="always", split=True),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=_WORD_START, prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "T5Tokenizer",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": 0,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return len(entries)


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
        """Canonical ids [B, L], padded with 0, and their numbers [B]."""
        rows = [[self.canonical[token] for token in ids] for ids in self.tokenizer(list(captions))["input_ids"]]
        width = max(len(row) for row in rows)
        return torch.tensor([row + [0] * (width - len(row)) for row in rows]), torch.tensor([len(row) for row in rows])


def _canonical_ids() -> list[int]:
    """For each id the one whose embedding it has: synonyms and capitals have that of the plain word, and the bare
    start of a word that of an unknown one."""
    first = len(_SPECIAL_TOKENS) + 1
    place = {token: first + index for index, (token, _) in enumerate(_words())}
    return [*range(len(_SPECIAL_TOKENS)), _UNKNOWN, *(place[plain] for _, plain in _words())]


def _words() -> list[tuple[str, str]]:
    """Every token of a word or sign, with the token whose meaning it has."""
    meaning: dict[str, str] = {sign: sign for sign in PUNCTUATION}
    for word in PLAIN_WORDS:
        for spelled in (word, *SYNONYMS.get(word, ())):
            for form in (spelled, spelled.capitalize(), spelled.upper()):
                meaning.setdefault(_WORD_START + form, _WORD_START + word)
    return list(meaning.items())
