from __future__ import annotations

from functools import cache

import pytest
from byte_tokenizers import KINDS, TEXTS
from tiny import WORDS

from align.engine.detokenizer import spell_token
from align.engine.protocol import Token
from align.engine.token_scores import locate_prompt, prompt_text


@cache
def tokenizer_of(kind: str):
    return KINDS[kind]()


def tokens_of(ids: list[int], tokenizer) -> list[Token]:
    return [Token(token, spell_token(token, tokenizer).text, -1.0, ()) for token in ids]


@pytest.mark.parametrize("kind", ["byte-level", "tokens across characters", "byte fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_tokens_of_a_prompt_cover_it_and_what_the_tokenizer_adds_has_no_part_in_it(kind, text):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)

    said, placed = locate_prompt(tokens_of(ids, tokenizer), text, tokenizer)

    assert said == text
    assert [token.id for token in placed] == ids
    assert b"".join(token.raw for token in placed) == text.encode()
    assert (placed[0].text == "<s>") == (kind == "byte fallback")
    before = 0
    for token in placed:
        assert token.start == len(text.encode()[:before].decode("utf-8", "ignore"))
        before += len(token.raw)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_read_as_they_would_be_written_control_tokens_by_name(kind):
    tokenizer = tokenizer_of(kind)
    ids = [*tokenizer.encode("the fox", add_special_tokens=False), tokenizer.eos_token_id]

    said, placed = locate_prompt(tokens_of(ids, tokenizer), None, tokenizer)

    assert said == prompt_text(None, ids, tokenizer) == tokenizer.decode(ids)
    assert "".join(token.text for token in placed) == said
    assert said.endswith(tokenizer.eos_token)


def test_a_tokenizer_that_changes_letters_gives_places_in_the_text_as_it_was_sent():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    lower = Tokenizer(models.WordLevel({word: place for place, word in enumerate(["?", *WORDS])}, unk_token="?"))
    lower.normalizer, lower.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=lower)
    text = "The  QUICK fox"

    said, placed = locate_prompt(tokens_of(tokenizer.encode(text), tokenizer), text, tokenizer)

    assert said == text
    assert [token.start for token in placed] == [0, 5, 11]
