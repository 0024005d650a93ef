"""A small T5 tokenizer made from a word list and whole Unicode blocks, so that no script turns into unknown tokens.

Knows the tokenizer's file format. Knows no model.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
"""Their ids are 0, 1 and 2."""

WORD_START = "▁"
_WORDS = """
a about above across after against air along an and animal apple around artist as at autumn background bad ball beach
bear beautiful behind below beside between big bird black blue blurry boat body book bright brown building butterfly by
camera car cat chair child cinematic city close cloud clouds coast cold color colorful cup dance dancing dark day deep
desert detailed distance dog down dragon drinks drives dusk earth eating evening face falling fast field fire fish
flower flowers flying focus fog forest fox from front garden glass glowing gold golden grass green ground hair hand
hands happy head high hill his horse house ice in into is island it its lake landscape large leaf left light lights long
low
man many mid moon morning motion mountain mountains moving music near neon night no north ocean of off old on one orange
over painting panda park path people person photo pink planet playing purple quality quiet rain rainbow red reflection
right river road robot rock rocks roof room rose rotating running sand scene sea shadow she ship shot sings sitting sky
slow slowly small smoke snow soft south space spring standing star stars still stone storm street style summer sun
sunlight sunrise sunset surface swimming table tall the their then there through tiger to toward train tree trees turtle
two under up video view walking wall warm water waterfall wave waves while white wide wild wind window winter with woman
wood world yellow young zoom
"""
_PARTS = """
an ar as at ed en er es et hi ic ie in ing io is it le ly nd ne ng nt on or ou re ri st te th ti to ve
"""
_BLOCKS = (
    (0x21, 0x7E),
    (0xA1, 0x167F),  # Latin, Greek, Cyrillic, Hebrew, Arabic, Indic, Thai, Georgian, Ethiopic, Cherokee, ...
    (0x1780, 0x18AF),  # Khmer, Mongolian
    (0x1E00, 0x2BFF),  # more Latin and Greek, punctuation, symbols
    (0x3001, 0x33FF),  # Japanese syllables, symbols
    (0x4E00, 0x9FFF),  # Chinese characters
    (0xA960, 0xA97F),
    (0xAC00, 0xD7A3),  # Korean syllables
    (0xF900, 0xFAFF),
    (0xFB00, 0xFFFD),
    (0x1D400, 0x1D7FF),  # mathematical letters
    (0x1F000, 0x1FAFF),  # pictographs
    (0xE0020, 0xE007F),
)
_WORD_SCORE, _PART_SCORE, _CHARACTER_SCORE = -6.0, -8.0, -10.0


def write_tokenizer(folder: Path) -> int:
    """Writes tokenizer.json and tokenizer_config.json into `folder`; returns the number of ids."""
    return write_unigram(folder, _vocabulary())


def write_unigram(folder: Path, vocabulary: list[tuple[str, float]]) -> int:
    """The same for tokens and their scores; `SPECIAL_TOKENS` come first."""
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement=WORD_START, prepend_scheme="always", split=True),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=WORD_START, prepend_scheme="always", split=True)
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
    return len(vocabulary)


def _vocabulary() -> list[tuple[str, float]]:
    scores = dict.fromkeys(SPECIAL_TOKENS, 0.0)
    scores[WORD_START] = _PART_SCORE
    for word in _WORDS.split():
        scores[WORD_START + word] = _WORD_SCORE
    for part in _PARTS.split():
        scores[part] = _PART_SCORE
    for first, last in _BLOCKS:
        for code in range(first, last + 1):
            scores.setdefault(chr(code), _CHARACTER_SCORE)
    return list(scores.items())
