"""Prompt cleaning, token ids and embeddings equal those of diffusers' pipeline."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import HeliosPipeline
from diffusers.pipelines.helios.pipeline_helios import prompt_clean
from safetensors.torch import load_file, save_file

from helios_serve.errors import CheckpointError
from helios_serve.model_executor.text_encoder import TextEncoder, clean_prompt
from helios_serve.types import MAX_TEXT_TOKENS

CPU = torch.device("cpu")

# fmt: off
PIECES = (
    "a red fox", "&amp;amp;quot;deep&amp;quot;", "&lt;b&gt;", "&#x1F600;", "&amp;#39;", "&nbsp;", "&notanentity;",
    "schÃ¶n", "âœ” done", "â€œquotedâ€\x9d", "cafe\u0301", "\u00a0", "\u2003", "\u3000", "\t", "\r\n", "\u2028", "\x0b",
    "\x85", "  ", "\u200b", "\u200d", "\ufeff", "\u202emirrored\u202c", "קשת בענן", "قطة في الثلج", "雪の中の狐",
    "눈 속의 여우", "🦊🏽\u200d🚀", "👨\u200d👩\u200d👧", "\x00", "\x1b[31m", "\x7f", "</s>", "<pad>", "<unk>",
    "<extra_id_0>", "ﬁne ﬂow", "Ｆｕｌｌ", "½ ∑ ∞", "A" * 300, "\U00012000", "\ud7ff", "\ufffd", "naïve", "‘curly’",
    "…", "--", "%20", "\\n", "{}", "ß", "İstanbul", "e\u0300\u0301\u0302",
)
# fmt: on


def awkward_prompts() -> list[str]:
    rng = random.Random(0)
    fixed = ["", " ", "\n\t\u00a0", "&amp;nbsp;", "cat " * 700, "猫" * 600, *PIECES]
    glued = [
        "".join(rng.choice(("", " ", "\n")) + rng.choice(PIECES) for _ in range(rng.randint(2, 9))) for _ in range(90)
    ]
    planes = ((0x20, 0x24F), (0x300, 0x52F), (0x590, 0x9FF), (0x2000, 0x2BFF), (0x3000, 0x9FFF), (0x1F300, 0x1FAFF))
    drawn = ["".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(1, 40))) for _ in range(70)]
    return fixed + glued + drawn


@pytest.fixture(scope="module")
def pipeline(tiny_base: Path) -> HeliosPipeline:
    return HeliosPipeline.from_pretrained(tiny_base, local_files_only=True)


@pytest.fixture(scope="module")
def encoder(tiny_base: Path) -> TextEncoder:
    return TextEncoder.load(tiny_base, CPU, torch.float32)


def test_cleaning_and_token_ids_equal_the_pipelines(pipeline: HeliosPipeline, encoder: TextEncoder) -> None:
    prompts = awkward_prompts()
    assert len(prompts) >= 200
    for prompt in prompts:
        cleaned = prompt_clean(prompt)
        assert clean_prompt(prompt) == cleaned, repr(prompt)
        padded = pipeline.tokenizer(
            [cleaned],
            padding="max_length",
            max_length=512,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
        )
        num_tokens = sum(padded["attention_mask"][0])
        assert encoder.token_ids(prompt) == padded["input_ids"][0][:num_tokens], repr(prompt)


def test_cleaning_by_hand() -> None:
    assert clean_prompt(" &amp;amp;lt;b&amp;gt;\u00a0\u3000schÃ¶n \n ") == "<b> schön"
    assert clean_prompt("<i> &amp;amp;lt;") == "<i> &lt;"  # twice, no more
    assert clean_prompt("&amp;nbsp;cat&amp;nbsp;") == "cat"


@pytest.mark.parametrize("max_tokens", [512, 226])
def test_embeddings_equal_the_pipelines(pipeline: HeliosPipeline, encoder: TextEncoder, max_tokens: int) -> None:
    prompts = ["", "a red fox  runs through &amp;quot;deep&amp;quot; snow", "雪の中の狐 🦊", "cat " * 250, "dog " * 700]
    with torch.no_grad():
        expected = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=max_tokens)[0]
    for prompt, theirs in zip(prompts, expected, strict=True):
        ours = encoder.encode(prompt, max_tokens)
        assert ours.shape == (max_tokens, encoder.text_dim)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
        num_tokens = len(encoder.token_ids(prompt, max_tokens))
        assert not ours[num_tokens:].any()
        assert ours[:num_tokens].any(dim=-1).all()


def test_a_gpus_way_gives_the_same_embeddings(encoder: TextEncoder, tiny_base: Path) -> None:
    lean = TextEncoder.load(tiny_base, CPU, torch.float32)
    assert not lean._runs_lean
    lean._runs_lean = True
    for prompt in ("", "a red fox", "cat " * 250, "dog " * 700):
        torch.testing.assert_close(lean.encode(prompt), encoder.encode(prompt), atol=1e-6, rtol=1e-6)


def test_an_empty_prompt_is_the_end_token(encoder: TextEncoder) -> None:
    assert encoder.token_ids("") == encoder.token_ids(" \u00a0\n") == [1]


def test_truncation_is_told(encoder: TextEncoder) -> None:
    fits, exceeds = "cat " * (MAX_TEXT_TOKENS - 1), "cat " * MAX_TEXT_TOKENS
    assert len(encoder.token_ids(fits)) == len(encoder.token_ids(exceeds)) == MAX_TEXT_TOKENS
    assert encoder.token_ids(exceeds)[-1] == 1
    assert not encoder.was_truncated(fits)
    assert encoder.was_truncated(exceeds)
    assert encoder.was_truncated("a red fox", max_tokens=3)


def test_loading_says_nothing(
    tiny_base: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    TextEncoder.load(tiny_base, CPU, torch.float32).encode("cat " * 700)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_bfloat16_weights_give_bfloat16_embeddings(tiny_base: Path) -> None:
    encoder = TextEncoder.load(tiny_base, CPU, torch.bfloat16)
    pipeline = HeliosPipeline.from_pretrained(tiny_base, dtype=torch.bfloat16, local_files_only=True)
    with torch.no_grad():
        theirs = pipeline.encode_prompt("a red fox", do_classifier_free_guidance=False, max_sequence_length=512)[0][0]
    ours = encoder.encode("a red fox")
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


def test_a_second_copy_of_the_embedding_is_not_used(tiny_base: Path, tmp_path: Path, encoder: TextEncoder) -> None:
    shutil.copytree(tiny_base, tmp_path / "copy")
    weights = tmp_path / "copy/text_encoder/model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"encoder.embed_tokens.weight": torch.zeros_like(tensors["shared.weight"])}, weights)
    other = TextEncoder.load(tmp_path / "copy", CPU, torch.float32)
    assert torch.equal(other.encode("a red fox"), encoder.encode("a red fox"))


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        ("empty", "has no tokenizer; tokenizer.json or spiece.model must be there"),
        ("garbage", "tokenizer.json is not valid JSON"),
        ("structure", "tokenizer.json cannot be read as a T5 tokenizer"),
    ],
)
def test_a_broken_tokenizer_is_told(tiny_base: Path, tmp_path: Path, breakage: str, message: str) -> None:
    shutil.copytree(tiny_base, tmp_path / "copy")
    file = tmp_path / "copy/tokenizer/tokenizer.json"
    if breakage == "empty":
        file.unlink()
    else:
        file.write_text("{ not json" if breakage == "garbage" else '{"model": {"type": "Unigram"}}')
    with pytest.raises(CheckpointError, match=message):
        TextEncoder.load(tmp_path / "copy", CPU, torch.float32)


def test_an_id_beyond_the_vocabulary_is_told(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "copy")
    folder = tmp_path / "copy/text_encoder"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"shared.weight": tensors["shared.weight"][:100].clone()}, folder / "model.safetensors")
    config = (folder / "config.json").read_text()
    vocab_size = tensors["shared.weight"].shape[0]
    (folder / "config.json").write_text(config.replace(f'"vocab_size": {vocab_size}', '"vocab_size": 100'))
    encoder = TextEncoder.load(tmp_path / "copy", CPU, torch.float32)
    with pytest.raises(CheckpointError, match=r"vocab_size of text_encoder/config\.json is 100"):
        encoder.encode("🦊")
