from __future__ import annotations

import random

import pytest
from tiny import tiny_tokenizer

from align.engine.detokenizer import StopStrings, TextBuffer
from align.engine.protocol import Token


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def speak(tokenizer, text: str, *stops: str) -> tuple[TextBuffer, list[str]]:
    """A text said token by token, as long as it is listened to, and the pieces that were shown."""
    speech = TextBuffer(tokenizer, stops)
    pieces = []
    for token in tokenizer.encode(text):
        pieces.append(speech.push(token).text)
        if speech.stopped:
            break
    pieces.append(speech.close().text)
    return speech, pieces


def test_a_text_ends_before_its_stop_string_which_is_never_shown(tokenizer):
    speech, pieces = speak(tokenizer, "the quick brown fox", "brown")

    assert "".join(pieces) == speech.text == "the quick "
    assert speech.stopped


def test_a_stop_string_split_over_tokens_is_held_back_whole(tokenizer):
    assert len(tokenizer.encode("XYZ")) == 3
    shown = []
    speech = TextBuffer(tokenizer, ["XYZ"])
    for token in tokenizer.encode("aXYbXYZc"):
        shown.append(speech.push(token).text)

    # X and Y wait for what follows; XY turns out to be text once the b is there.
    assert shown == ["a", "", "", "XYb", "", "", "", ""]
    assert speech.text == "aXYb"


def test_the_beginning_of_a_stop_string_at_the_end_is_text(tokenizer):
    speech, pieces = speak(tokenizer, "one END", "ENDING")

    assert "".join(pieces) == speech.text == "one END"
    assert not speech.stopped


def test_stop_strings_of_chinese_and_emoji_are_found_though_their_characters_are_split(tokenizer):
    speech, pieces = speak(tokenizer, "答案是四。👍 完了", "👍")

    assert "".join(pieces) == speech.text == "答案是四。"
    assert not any("�" in piece for piece in pieces)


def test_the_first_of_several_stop_strings_ends_the_text(tokenizer):
    assert speak(tokenizer, "a lazy dog and a fox", "fox", "dog", "cat")[0].text == "a lazy "


def test_a_stop_string_that_only_comes_whole_at_the_end_is_found(tokenizer):
    # The last character of the stop string is incomplete until the text is closed.
    half = tokenizer.encode("a中")[:-1]
    speech = TextBuffer(tokenizer, ["�"])
    for token in half:
        speech.push(token)
    speech.close()

    assert speech.stopped
    assert speech.text == "a"


def test_random_texts_are_cut_where_find_would_cut_them():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("aab") for _ in range(12))
        stop = "".join(rng.choice("ab") for _ in range(rng.randint(1, 4)))
        cut, shown = StopStrings([stop]), ""
        rest = text
        while rest:
            size = rng.randint(1, 3)
            shown, rest = shown + cut.push(rest[:size]), rest[size:]
        shown += cut.flush()

        assert shown == (text[: text.find(stop)] if stop in text else text)
        assert cut.found == (stop in text)


def told(place: int) -> Token:
    return Token(place, "", -1.0, ())


def test_tokens_are_told_with_the_text_they_made_and_all_of_them(tokenizer):
    ids = tokenizer.encode("a中b")
    assert len(ids) == 5
    speech = TextBuffer(tokenizer, [])
    pieces = [speech.push(token, told(place)) for place, token in enumerate(ids)]

    assert [piece.text for piece in pieces] == ["a", "", "", "中", "b"]
    assert [[token.id for token in piece.tokens] for piece in pieces] == [[0], [], [], [1, 2, 3], [4]]


def test_tokens_of_a_stop_string_are_not_told(tokenizer):
    speech = TextBuffer(tokenizer, ["XYZ"])
    pieces = [speech.push(token, told(place)) for place, token in enumerate(tokenizer.encode("aXbXYZ"))]

    assert [token.id for piece in pieces for token in piece.tokens] == [0, 1, 2]
    assert speech.close() == ("", ())


def test_tokens_held_to_the_end_are_told_at_the_end(tokenizer):
    speech = TextBuffer(tokenizer, ["XYZ"])
    for place, token in enumerate(tokenizer.encode("aXY")):
        speech.push(token, told(place))

    piece = speech.close()

    assert (piece.text, [token.id for token in piece.tokens]) == ("XY", [1, 2])
