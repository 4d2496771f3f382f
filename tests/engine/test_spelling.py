"""The bytes of an answer's tokens are the UTF-8 of the answer, and their places are places in it, however it is cut."""

from __future__ import annotations

import random
from functools import cache

import pytest
from byte_tokenizers import KINDS, TEXTS

from align.engine.detokenizer import TextBuffer, spell_token
from align.engine.protocol import Alternative, Token
from align.engine.token_scores import make_alternative


@cache
def tokenizer_of(kind: str):
    return KINDS[kind]()


def say(tokenizer, ids: list[int], *stops: str, context: tuple[int, ...] = ()) -> tuple[TextBuffer, list]:
    """Some tokens said one after the other, and the pieces they came in."""
    speech, pieces = TextBuffer(tokenizer, stops, context), []
    for token in ids:
        text, raw, _ = spell_token(token, tokenizer)
        pieces.append(speech.push(token, Token(token, text, -1.0, (make_alternative(token, -1.0, tokenizer),), raw)))
        if speech.stopped:
            break
    return speech, [*pieces, speech.close()]


def check(speech: TextBuffer, pieces: list) -> list[Token]:
    """The tokens, whose bytes and places must fit the text, and piece by piece must be a beginning of it."""
    tokens = [token for piece in pieces for token in piece.tokens]
    text = speech.text.encode()
    assert b"".join(token.raw for token in tokens) == text
    before = 0
    for token in tokens:
        assert token.start == len(text[:before].decode("utf-8", "ignore"))
        if "�" not in token.text and token.raw:
            assert speech.text[token.start :].startswith(token.text)
        before += len(token.raw)
    told = shown = b""
    for piece in pieces:
        told += b"".join(token.raw for token in piece.tokens)
        shown += piece.text.encode()
        assert shown.startswith(told)
    return tokens


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_all_tokens_are_the_utf8_of_the_text(kind, text):
    tokenizer = tokenizer_of(kind)
    ids = ids_of(tokenizer, text)

    speech, pieces = say(tokenizer, ids)

    assert [token.id for token in check(speech, pieces)] == ids
    assert speech.text == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_random_texts_cut_by_random_stop_strings_keep_to_their_bytes(kind):
    rng, tokenizer = random.Random(1), tokenizer_of(kind)
    for _ in range(60):
        text = "".join(rng.choice(["a", "b", " ", "the", "中", "中国", "👍", "\n", "é"]) for _ in range(12))
        ids = ids_of(tokenizer, text)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        begin = rng.randrange(len(whole))
        stop = whole[begin : begin + rng.randint(1, 3)]

        speech, pieces = say(tokenizer, ids, stop)

        check(speech, pieces)
        assert speech.text == whole[: whole.index(stop)]


@pytest.mark.parametrize("kind", ["byte-level", "tokens across characters", "byte fallback"])
def test_an_answer_that_ends_within_a_character_tells_the_bytes_it_has(kind):
    tokenizer = tokenizer_of(kind)
    ids = ids_of(tokenizer, "a👍")[:-1]

    speech, pieces = say(tokenizer, ids)

    raws = b"".join(token.raw for piece in pieces for token in piece.tokens)
    assert raws == "a👍".encode()[:-1]
    assert speech.text.startswith("a�")


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_token_within_an_answer_has_a_name_and_no_bytes(kind):
    tokenizer = tokenizer_of(kind)
    ids = [*ids_of(tokenizer, "the 中"), tokenizer.eos_token_id, *ids_of(tokenizer, "fox")]

    tokens = check(*say(tokenizer, ids))

    (control,) = [token for token in tokens if token.id == tokenizer.eos_token_id]
    assert (control.text, control.raw) == (tokenizer.eos_token, b"")


@pytest.mark.parametrize("kind", ["byte fallback", "metaspace"])
def test_what_goes_on_with_a_text_keeps_its_first_space_and_an_answer_does_not(kind):
    tokenizer = tokenizer_of(kind)
    context, ids = ids_of(tokenizer, "the"), ids_of(tokenizer, "fox")

    alone, after = (check(*say(tokenizer, ids, context=before)) for before in ((), tuple(context)))

    assert (alone[0].text[:1], after[0].text[:1]) != (" ", "f")
    assert "".join(token.text for token in alone) == "fox"
    assert "".join(token.text for token in after) == " fox"
    # The likeliest token reads as the token itself.
    assert all(token.top == (Alternative(token.text, -1.0, token.raw, token.id),) for token in after)
    assert (alone[0].top[0].text, alone[0].top[0].raw) == (alone[0].text, alone[0].raw)


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_a_character_that_begins_in_the_prompt_is_whole_in_the_answer(kind):
    tokenizer = tokenizer_of(kind)
    ids = ids_of(tokenizer, "a👍b")
    begun = next(place for place, token in enumerate(ids) if spell_token(token, tokenizer).raw[:1] == "👍".encode()[:1])

    speech, pieces = say(tokenizer, ids[begun + 2 :], context=tuple(ids[: begun + 2]))

    check(speech, pieces)
    assert speech.text == "👍b"


@pytest.mark.parametrize(
    ("kind", "token", "raw"),
    [
        ("byte-level", "ä", b"\xe4"),
        ("byte-level", "Ġ", b" "),
        ("tokens across characters", "Ġä", b" \xe4"),
        ("byte fallback", "<0xE4>", b"\xe4"),
        ("byte fallback", "<0x41>", b"A"),
        ("byte fallback", "▁the", b" the"),
        ("metaspace", "▁the", b" the"),
        ("metaspace", "中", "中".encode()),
    ],
)
def test_a_token_has_the_bytes_its_vocabulary_gives_it(kind, token, raw):
    tokenizer = tokenizer_of(kind)

    assert spell_token(tokenizer.convert_tokens_to_ids(token), tokenizer).raw == raw
