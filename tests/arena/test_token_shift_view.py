from __future__ import annotations

import pytest

from align.arena.battle_view import merge_character_parts
from align.engine.protocol import ShiftedToken


def token(text: str, logprob: float, base: float, top: str = "x") -> ShiftedToken:
    return ShiftedToken(text, logprob, base, ((top, -0.1),), ((f"base {top}", -0.2),))


def test_the_tokens_of_one_character_are_one_piece_with_their_chances_multiplied():
    tokens = [
        token("ab", -1, -2),
        token("", -1, -3, "first"),
        token("", -0.5, -0.25),
        token("退", -2, -1),
        token("c", -1, -1),
    ]

    pieces = merge_character_parts(tokens)

    assert [piece.text for piece in pieces] == ["ab", "退", "c"]
    assert (pieces[1].logprob, pieces[1].base_logprob) == (-3.5, -4.25)
    assert pieces[1].top == (("first", -0.1),)
    assert pieces[1].base_top == (("base first", -0.2),)
    assert [pieces[0], pieces[2]] == [tokens[0], tokens[4]]


def test_nothing_of_the_total_shift_is_lost():
    tokens = [token(text, -1.0, -0.5 * place) for place, text in enumerate(["", "", "é", "", "ü", "", ""])]

    pieces = merge_character_parts(tokens)

    shift = sum(piece.logprob - piece.base_logprob for piece in pieces)
    assert shift == pytest.approx(sum(each.logprob - each.base_logprob for each in tokens))


def test_no_answer_is_no_pieces():
    assert merge_character_parts([]) == []
