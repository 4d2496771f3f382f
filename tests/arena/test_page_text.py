from __future__ import annotations

import re
from pathlib import Path

import align.arena
from align.arena.ballot import choices
from align.arena.text import CATALOGUE, language_of, vote_key

SOURCES = "".join(path.read_text() for path in Path(align.arena.__file__).parent.glob("*.py") if path.name != "text.py")


def test_both_languages_say_the_same_things():
    assert CATALOGUE["en"].keys() == CATALOGUE["zh-CN"].keys()
    for key, text in CATALOGUE["en"].items():
        assert re.findall(r"\{\w+", text) == re.findall(r"\{\w+", CATALOGUE["zh-CN"][key])


def test_every_sentence_is_used():
    votes = {vote_key(choice, panes) for panes in (2, 4) for choice in choices(panes)}
    infos = {key for key in CATALOGUE["en"] if key.endswith("_info")}

    assert [key for key in CATALOGUE["en"] if f'"{key}"' not in SOURCES and key not in votes | infos] == []


def test_every_refusal_has_a_sentence():
    shown = set(re.findall(r'Refusal\("(\w+)"\)', SOURCES)) - {"voted_already"}

    assert shown <= CATALOGUE["en"].keys()


def test_the_language_is_the_browsers_first():
    assert language_of("zh-TW,zh;q=0.9,en;q=0.8") == "zh-CN"
    assert language_of("de-DE,zh;q=0.5") == language_of("") == language_of(None) == "en"
