from __future__ import annotations

import random

import pytest
from tiny import tiny_tokenizer

from align.engine.detokenizer import Detokenizer, text_of

TEXTS = [
    "the quick brown fox",
    "退款需要五个工作日。",
    "mixed 中文 and English, ok",
    "👍🏽 family: 👨‍👩‍👧‍👦 done",
    "  leading spaces\n\nand lines",
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize("prefix", ["always", "never"])
def test_a_token_alone_keeps_the_space_that_it_has_in_a_text(prefix):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"▁the": 0, "▁fox": 1, "es": 2}, unk_token="es"))
    words.decoder = decoders.Metaspace(prepend_scheme=prefix)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)

    assert [text_of(token, tokenizer) for token in (0, 1, 2)] == [" the", " fox", "es"]


def test_a_token_alone_is_its_own_text(tokenizer):
    tokens = tokenizer.encode("the fox 中<|im_end|>")

    assert [text_of(token, tokenizer) for token in tokens] == [tokenizer.decode([token]) for token in tokens]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_whole_text_and_never_shows_half_a_character(tokenizer, text):
    detokenizer = Detokenizer(tokenizer)

    pieces = [detokenizer.push(token) for token in tokenizer.encode(text)]
    pieces.append(detokenizer.flush())

    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 2


def test_a_character_is_shown_with_its_last_byte(tokenizer):
    tokens = tokenizer.encode("中")
    detokenizer = Detokenizer(tokenizer)

    pieces = [detokenizer.push(token) for token in tokens]

    assert len(tokens) == 3
    assert pieces == ["", "", "中"]


def test_control_tokens_are_not_shown(tokenizer):
    detokenizer = Detokenizer(tokenizer)

    pieces = [detokenizer.push(token) for token in tokenizer.encode("fox<|im_end|>dog")]

    assert "".join(pieces) == "foxdog"


def test_half_a_character_at_the_end_comes_out_with_flush(tokenizer):
    detokenizer = Detokenizer(tokenizer)

    shown = [detokenizer.push(token) for token in tokenizer.encode("a中")[:-1]]

    assert "".join(shown) == "a"
    assert detokenizer.flush() == "�"


def test_bytes_that_are_no_text_do_not_hold_the_stream_back_for_ever(tokenizer):
    stray = tokenizer.encode("中")[1]  # a continuation byte
    detokenizer = Detokenizer(tokenizer)

    shown = [detokenizer.push(stray) for _ in range(40)]

    assert any(shown)


def test_random_tokens_stream_what_they_decode_to(tokenizer):
    rng = random.Random(0)
    for _ in range(20):
        text = "".join(rng.choice("ab 中文👍é\n") for _ in range(30))
        detokenizer = Detokenizer(tokenizer)

        pieces = [detokenizer.push(token) for token in tokenizer.encode(text)]

        assert "".join(pieces) + detokenizer.flush() == text
