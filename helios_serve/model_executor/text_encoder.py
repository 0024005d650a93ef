"""Prompts to embeddings: cleaning, token ids, UMT5.

Knows the reference's order of cleaning and its zero padding. Knows nothing of guidance, caching or the transformer.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

import ftfy
import torch
import torch.nn.functional as F  # noqa: N812
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from helios_serve.errors import CheckpointError
from helios_serve.model_executor.checkpoint import Load, load_module, read_json
from helios_serve.model_executor.model_config import TEXT_ENCODER_FILE
from helios_serve.model_executor.offload import offload_sequence
from helios_serve.model_executor.umt5 import encode_tokens, is_supported
from helios_serve.types import MAX_TEXT_TOKENS

_WHITESPACE = re.compile(r"\s+")
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


def clean_prompt(text: str) -> str:
    """A prompt as it is tokenised: mended by ftfy, HTML entities decoded twice, runs of whitespace as one space."""
    mended = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _WHITESPACE.sub(" ", mended.strip()).strip()


class TextEncoder:
    """UMT5 and its tokenizer.

    Args:
        model: ready to run, on its device.
        tokenizer: gives ids below the model's vocabulary size.
    """

    def __init__(self, model: UMT5EncoderModel, tokenizer: T5Tokenizer) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._device = model.device
        self._runs_lean = self._device.type != "cpu" and is_supported(model.config)

    @classmethod
    def load(cls, path: Path, device: torch.device, dtype: torch.dtype, load: Load = load_module) -> TextEncoder:
        """Reads `text_encoder/` and `tokenizer/` of the checkpoint in `path`; `load` makes the model.

        Raises: CheckpointError naming the file or the keys that are wrong.
        """
        umt5 = _umt5_config(path)
        tokenizer = _load_tokenizer(path / "tokenizer")
        model = load(lambda: _build_umt5(umt5, path), path / "text_encoder", device, dtype)
        return cls(model, tokenizer)

    def offload(self, device: torch.device) -> None:
        """Keeps the model in host memory; its layers visit `device` one by one. Tokens are embedded on the host."""
        stack = self._model.encoder
        offload_sequence([*stack.block], device)
        stack.final_layer_norm.to(device)
        self._device = device
        self._runs_lean = False  # layers visit the device when the library calls them

    @property
    def text_dim(self) -> int:
        return int(self._model.config.d_model)

    def token_ids(self, prompt: str, max_tokens: int = MAX_TEXT_TOKENS) -> list[int]:
        """Ids of the cleaned prompt with the end token, at most `max_tokens`; an empty prompt is the end token."""
        ids: list[int] = self._tokenizer(clean_prompt(prompt), truncation=True, max_length=max_tokens)["input_ids"]
        return ids

    def was_truncated(self, prompt: str, max_tokens: int = MAX_TEXT_TOKENS) -> bool:
        """Whether `token_ids` leaves out the end of this prompt."""
        ids = self._tokenizer(clean_prompt(prompt), truncation=True, max_length=max_tokens + 1)["input_ids"]
        return len(ids) > max_tokens

    @torch.inference_mode()
    def encode(self, prompt: str, max_tokens: int = MAX_TEXT_TOKENS) -> Tensor:
        """The prompt's embedding [max_tokens, text_dim] in the encoder's dtype, exact zeros behind its last token.

        Padding is masked out of every attention, so only the prompt's own tokens are run; on a CPU all are, as in the
        reference, whose sums have the same order then.
        """
        ids = self.token_ids(prompt, max_tokens)
        vocab_size = self._model.config.vocab_size
        if max(ids) >= vocab_size:
            raise CheckpointError(
                f"tokenizer: made the id {max(ids)}; vocab_size of {TEXT_ENCODER_FILE} is {vocab_size}"
            )
        num_run = max_tokens if self._device.type == "cpu" and not self._runs_lean else len(ids)
        table = self._model.shared.weight
        padded = torch.tensor(ids + [self._model.config.pad_token_id] * (num_run - len(ids)), device=table.device)
        tokens = F.embedding(padded, table).to(self._device)
        hidden = encode_tokens(self._model, tokens) if self._runs_lean else self._encode_padded(tokens, len(ids))
        embeds = hidden.new_zeros((max_tokens, hidden.shape[-1]), dtype=self._model.dtype)
        embeds[: len(ids)] = hidden[: len(ids)]
        return embeds

    def _encode_padded(self, tokens: Tensor, num_real: int) -> Tensor:
        """The library's own hidden states [N, D] of embedded tokens [N, D], behind the first `num_real` of padding."""
        mask = torch.arange(len(tokens), device=self._device) < num_real
        output = self._model(inputs_embeds=tokens[None], attention_mask=mask[None].long())
        hidden: Tensor = output.last_hidden_state[0]
        return hidden


def _umt5_config(path: Path) -> UMT5Config:
    file = path / TEXT_ENCODER_FILE
    try:
        return UMT5Config.from_dict(read_json(file))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is not a UMT5 configuration: {error}") from error


def _build_umt5(config: UMT5Config, path: Path) -> UMT5EncoderModel:
    try:
        return UMT5EncoderModel(config)
    except KeyError as error:  # an activation that transformers does not have
        raise CheckpointError(
            f"{path / TEXT_ENCODER_FILE}: feed_forward_proj is {config.feed_forward_proj!r}; 'gated-gelu' is served"
        ) from error


def _load_tokenizer(folder: Path) -> T5Tokenizer:
    present = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        raise CheckpointError(f"{folder} has no tokenizer; {' or '.join(_TOKENIZER_FILES)} must be there")
    if "tokenizer.json" in present:
        read_json(folder / "tokenizer.json")
    try:
        return T5Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions for damaged files
        raise CheckpointError(f"{folder / present[0]} cannot be read as a T5 tokenizer: {error}") from error
