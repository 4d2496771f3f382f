from __future__ import annotations

import re
from pathlib import Path

import align.arena
from align.arena.page_text import PAGE_TEXTS, language_of, vote_key
from align.arena.votes import TAGS, choices

SOURCES = "".join(path.read_text() for path in Path(align.arena.__file__).parent.glob("*.py"))
WARNINGS = set(re.findall(r'LeaderboardWarning\("(\w+)"', SOURCES))


def used(key: str) -> bool:
    return f'"{key}"' in SOURCES or f"'{key}'" in SOURCES


def test_both_languages_say_the_same_things():
    assert PAGE_TEXTS["en"].keys() == PAGE_TEXTS["zh-CN"].keys()
    for key, text in PAGE_TEXTS["en"].items():
        assert sorted(re.findall(r"\{\w+", text)) == sorted(re.findall(r"\{\w+", PAGE_TEXTS["zh-CN"][key]))


def test_every_sentence_is_used():
    votes = {vote_key(choice, panes) for panes in (2, 4) for choice in choices(panes)}
    infos = {key for key in PAGE_TEXTS["en"] if key.endswith("_info")}
    made = votes | infos | {f"tag_{tag}" for tag in TAGS} | {f"warning_{key}" for key in WARNINGS}

    assert [key for key in PAGE_TEXTS["en"] if not used(key) and key not in made] == []


def test_every_warning_of_the_leaderboard_and_every_tag_has_a_sentence():
    assert len(WARNINGS) >= 6
    assert {f"warning_{key}" for key in WARNINGS} | {f"tag_{tag}" for tag in TAGS} <= PAGE_TEXTS["en"].keys()


def test_every_refusal_has_a_sentence():
    shown = set(re.findall(r'ActionRefused\("(\w+)"\)', SOURCES)) - {"voted_already"}

    assert shown <= PAGE_TEXTS["en"].keys()


def test_the_language_is_the_browsers_first():
    assert language_of("zh-TW,zh;q=0.9,en;q=0.8") == "zh-CN"
    assert language_of("de-DE,zh;q=0.5") == language_of("") == language_of(None) == "en"
