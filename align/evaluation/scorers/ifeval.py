"""IFEval: whether a response follows the instructions a program can verify (Zhou et al. 2023, sections 2 and 3).

Prompt-level accuracy asks for all of them, instruction-level accuracy counts each. The loose kind takes a response for
following an instruction if it does so, too, without its first line, without its last line, without its asterisks
or without several of these, since models often begin with "Sure, here it is:".

A check (table 1) takes a response and the instruction's arguments. Counted words are runs of letters and digits;
sentences end in a full stop, a question mark or an exclamation mark. Why not lm-eval's: decision 40.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

from align.errors import DataError, nearest, shorten
from align.evaluation.languages import detect_language
from align.evaluation.scorers import scorer
from align.schema import Record

Check = Callable[..., bool]

_MAX_CHARACTERS = 200_000
"""of a response are read"""
_WORD = re.compile(r"\w+")
_SPOKEN = re.compile(r"[^\W_]+(?:[.-][^\W_]+)*")
_SENTENCE_END = re.compile(r"(?<![.!?。！？])[.!?。！？]++[\"'”’)\]]*+")
_ABBREVIATION = re.compile(r"(?:\b(?:mr|mrs|ms|dr|prof|st|vs|etc|jr|sr|no|e\.g|i\.e)|\b[a-z](?:\.[a-z])*)\.$", re.I)
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _holds(count: int, relation: str, number: int) -> bool:
    match relation:
        case "less than":
            return count < number
        case "at least":
            return count >= number
    raise DataError(f"relation {shorten(relation)}: not known; write 'less than' or 'at least'")


def _count_matches(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.IGNORECASE))


def _has_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Check paragraphs separated by ***; the first and the last may be empty, others may not."""
    parts = [part.strip() for part in text.split("***")]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def _has_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Check the number of paragraphs separated by blank lines, and the first word of the n-th."""
    paragraphs = text.split("\n\n")
    filled = sum(bool(part.strip()) for part in paragraphs)
    if not 1 <= nth_paragraph <= filled == num_paragraphs:
        return False
    words = paragraphs[nth_paragraph - 1].split()
    match = re.match(r"[^.,?!'\"]*", words[0].lstrip("'\"")) if words else None
    return match is not None and match[0].lower() == first_word.lower()


def _has_postscript(text: str, postscript_marker: str) -> bool:
    """Check for the marker, whose letters may have white space between them."""
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = patterns.get(postscript_marker) or re.escape(postscript_marker.lower())
    return re.search(pattern, text.lower()) is not None


def _has_highlights(text: str, num_highlights: int) -> bool:
    """Count non-empty parts of a line between single or double asterisks."""
    parts = [*re.findall(r"\*([^\n*]*)\*", text), *re.findall(r"\*\*([^\n*]*)\*\*", text)]
    return sum(bool(part.strip()) for part in parts) >= num_highlights


def _is_json(text: str) -> bool:
    """Parse the whole response, apart from a fence around it."""
    bare = text.strip().removeprefix("```").removesuffix("```")
    bare = bare[4:] if bare[:4].lower() == "json" else bare
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def _has_two_responses(text: str) -> bool:
    """Check two different answers separated by six asterisks, which may also begin and end the text."""
    parts = [part.strip() for part in text.split("******")]
    answers = [part for part in parts if part]
    return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


CHECKS: dict[str, Check] = {
    "keywords:existence": lambda text, keywords: all(_count_matches(re.escape(word), text) for word in keywords),
    "keywords:frequency": lambda text, keyword, frequency, relation: _holds(
        _count_matches(re.escape(keyword), text), relation, frequency
    ),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(_count_matches(rf"\b{re.escape(word)}\b", text) for word in forbidden_words)
    ),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation: _holds(
        text.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "language:response_language": lambda text, language: detect_language(text) == language,
    "length_constraints:number_sentences": lambda text, num_sentences, relation: _holds(
        count_sentences(text), relation, num_sentences
    ),
    "length_constraints:number_words": lambda text, num_words, relation: _holds(
        len(_WORD.findall(text)), relation, num_words
    ),
    "length_constraints:number_paragraphs": _has_paragraphs,
    "length_constraints:nth_paragraph_first_word": _has_first_word,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(_enclosed(text, "[", "]")) >= num_placeholders
    ),
    "detectable_content:postscript": _has_postscript,
    "detectable_format:number_bullet_lists": lambda text, num_bullets: (
        len(re.findall(r"(?m)^[^\S\n]*(?:\*[^*\n].*|-.*)$", text)) == num_bullets
    ),
    "detectable_format:constrained_response": lambda text: any(answer in text for answer in _CONSTRAINED),
    "detectable_format:number_highlighted_sections": _has_highlights,
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (
        len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections
    ),
    "detectable_format:json_format": _is_json,
    "detectable_format:title": lambda text: any(title.strip("<>").strip() for title in _enclosed(text, "<<", ">>")),
    "combination:two_responses": _has_two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda text: re.fullmatch('(?s)".*"', text.strip()) is not None,
    "change_case:capital_word_frequency": lambda text, capital_frequency, capital_relation: _holds(
        sum(word.isupper() for word in _SPOKEN.findall(text)), capital_relation, capital_frequency
    ),
    "change_case:english_capital": lambda text: text.isupper() and detect_language(text) == "en",
    "change_case:english_lowercase": lambda text: text.islower() and detect_language(text) == "en",
    "punctuation:no_comma": lambda text: "," not in text,
}
"""by IFEval's id of the instruction; the parameters are its arguments"""


def follows(response: str, instruction: str, arguments: dict[str, Any]) -> bool:
    """Return whether a response follows an instruction; an empty one never does. DataError for unknown ones."""
    check = CHECKS.get(instruction)
    if check is None:
        raise DataError(f"instruction {shorten(instruction)}: not known;{nearest(str(instruction), CHECKS)}")
    given = {key: value for key, value in arguments.items() if value is not None}
    try:
        return bool(response.strip()) and check(response, **given)
    except (TypeError, AttributeError) as error:
        raise DataError(f"instruction {instruction}: its arguments {shorten(given)} do not fit ({error})") from None


def count_sentences(text: str) -> int:
    """Return the number of sentences; abbreviations and numbers end none, and unterminated text is one."""
    count, start = 0, 0
    for end in _SENTENCE_END.finditer(text):
        if _ends_sentence(text, end, start):
            count += bool(_WORD.search(text, start, end.end()))
            start = end.end()
    return count + bool(_WORD.search(text, start))


def _ends_sentence(text: str, end: re.Match[str], start: int) -> bool:
    if end.end() == len(text) or any(mark in end[0] for mark in "。！？"):
        return True
    if not text[end.end()].isspace():
        return False
    return end[0] != "." or not _ABBREVIATION.search(text[max(start, end.start() - 8) : end.end()])


def _enclosed(text: str, opening: str, closing: str) -> list[str]:
    """Return the texts between two marks on one line; a pattern would take quadratic time over marks alone."""
    parts = []
    for line in text.split("\n"):
        start = line.find(opening)
        while start >= 0 and (end := line.find(closing, start + len(opening))) >= 0:
            parts.append(line[start + len(opening) : end])
            start = line.find(opening, end + len(closing))
    return parts


@scorer(
    needs=("meta.instruction_id_list", "meta.kwargs"),
    weights={"instruction_strict": "instructions", "instruction_loose": "instructions"},
)
def ifeval(record: Record, completion: str) -> dict[str, float]:
    """Return prompt-level and instruction-level accuracy, strict and loose."""
    names, arguments = record.meta["instruction_id_list"], record.meta["kwargs"]
    sound = isinstance(names, list) and isinstance(arguments, list) and len(names) == len(arguments) > 0
    if not sound or not all(isinstance(given, dict) for given in arguments):
        raise DataError(
            f"scorer ifeval: instruction_id_list and kwargs of {record.where} are not lists of one length; "
            "correct the row"
        )
    instructions = list(zip(names, arguments, strict=True))
    variants = loose_variants(completion[:_MAX_CHARACTERS])
    strict = [follows(variants[0], *instruction) for instruction in instructions]
    loose = [
        good or any(follows(text, *instruction) for text in variants[1:])
        for good, instruction in zip(strict, instructions, strict=True)
    ]
    return {
        "prompt_strict": float(all(strict)),
        "instruction_strict": sum(strict) / len(instructions),
        "prompt_loose": float(all(loose)),
        "instruction_loose": sum(loose) / len(instructions),
        "instructions": float(len(instructions)),
    }


def loose_variants(response: str) -> list[str]:
    """Return the response and variants without first line, last line or both, and all without asterisks."""
    lines = response.split("\n")
    cut = [lines[first:last] for first, last in itertools.product((0, 1), (len(lines), len(lines) - 1))]
    texts = [response, *("\n".join(part).strip() for part in cut[1:])]
    return [*texts, *(text.replace("*", "") for text in texts)]
