"""Instructions a program can verify, as IFEval defines them (Zhou et al. 2023, table 1): 25 checks by their ids.

A check takes a response and the arguments of the instruction and says whether the response follows it. Words, as far
as they are counted, are runs of letters and digits; sentences end in a full stop, a question or an exclamation mark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from align.errors import DataError, nearest, shorten
from align.evaluation.languages import detect_language

Check = Callable[..., bool]
CHECKS: dict[str, Check] = {}

_WORD = re.compile(r"\w+")
_SPOKEN = re.compile(r"[^\W_]+(?:[.-][^\W_]+)*")
_SENTENCE_END = re.compile(r"(?<![.!?。！？])[.!?。！？]++[\"'”’)\]]*+")
_ABBREVIATION = re.compile(r"(?:\b(?:mr|mrs|ms|dr|prof|st|vs|etc|jr|sr|no|e\.g|i\.e)|\b[a-z](?:\.[a-z])*)\.$", re.I)
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def follows(response: str, instruction: str, arguments: dict[str, Any]) -> bool:
    """Whether a response follows an instruction; an empty one follows none. DataError for what cannot be checked."""
    check = CHECKS.get(instruction)
    if check is None:
        raise DataError(f"instruction {shorten(instruction)}: not known;{nearest(str(instruction), CHECKS)}")
    given = {key: value for key, value in arguments.items() if value is not None}
    try:
        return bool(response.strip()) and check(response, **given)
    except (TypeError, AttributeError) as error:
        raise DataError(f"instruction {instruction}: its arguments {shorten(given)} do not fit ({error})") from None


def _checks(instruction: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS[instruction] = check
        return check

    return register


def _holds(count: int, relation: str, number: int) -> bool:
    if relation not in ("less than", "at least"):
        raise DataError(f"relation {shorten(relation)}: not known; write 'less than' or 'at least'")
    return count < number if relation == "less than" else count >= number


@_checks("keywords:existence")
def _all_keywords(text: str, keywords: list[str]) -> bool:
    return all(re.search(re.escape(word), text, re.IGNORECASE) for word in keywords)


@_checks("keywords:frequency")
def _keyword_often(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(len(re.findall(re.escape(keyword), text, re.IGNORECASE)), relation, frequency)


@_checks("keywords:forbidden_words")
def _no_forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


@_checks("keywords:letter_frequency")
def _letter_often(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(text.lower().count(letter.lower()), let_relation, let_frequency)


@_checks("language:response_language")
def _in_language(text: str, language: str) -> bool:
    return detect_language(text) == language


@_checks("length_constraints:number_sentences")
def _sentence_count(text: str, num_sentences: int, relation: str) -> bool:
    return _holds(count_sentences(text), relation, num_sentences)


@_checks("length_constraints:number_words")
def _word_count(text: str, num_words: int, relation: str) -> bool:
    return _holds(len(_WORD.findall(text)), relation, num_words)


@_checks("length_constraints:number_paragraphs")
def _paragraph_count(text: str, num_paragraphs: int) -> bool:
    """Paragraphs parted by ***; one that begins or ends the response may be empty, another may not."""
    parts = [part.strip() for part in text.split("***")]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


@_checks("length_constraints:nth_paragraph_first_word")
def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs parted by blank lines, so many of them, of which the n-th starts with a word."""
    paragraphs = text.split("\n\n")
    filled = sum(bool(part.strip()) for part in paragraphs)
    if not 1 <= nth_paragraph <= filled == num_paragraphs:
        return False
    words = paragraphs[nth_paragraph - 1].split()
    found = re.match(r"[^.,?!'\"]*", words[0].lstrip("'\"")) if words else None
    return found is not None and found[0].lower() == first_word.lower()


@_checks("detectable_content:number_placeholders")
def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(_enclosed(text, "[", "]")) >= num_placeholders


@_checks("detectable_content:postscript")
def _postscript(text: str, postscript_marker: str) -> bool:
    """The letters of the marker may have white space between them."""
    marks = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = marks.get(postscript_marker) or re.escape(postscript_marker.lower())
    return re.search(pattern, text.lower()) is not None


@_checks("detectable_format:number_bullet_lists")
def _bullets(text: str, num_bullets: int) -> bool:
    """Lines that begin with one asterisk or with a dash, exactly so many."""
    return len(re.findall(r"(?m)^[^\S\n]*(?:\*[^*\n].*|-.*)$", text)) == num_bullets


@_checks("detectable_format:constrained_response")
def _one_of_three(text: str) -> bool:
    return any(answer in text for answer in _CONSTRAINED)


@_checks("detectable_format:number_highlighted_sections")
def _highlights(text: str, num_highlights: int) -> bool:
    """Stretches of a line between asterisks, single or double, with something in them."""
    single = [part for part in re.findall(r"\*([^\n*]*)\*", text) if part.strip()]
    double = [part for part in re.findall(r"\*\*([^\n*]*)\*\*", text) if part.strip()]
    return len(single) + len(double) >= num_highlights


@_checks("detectable_format:multiple_sections")
def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """Headings of the given word and a number."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


@_checks("detectable_format:json_format")
def _json(text: str) -> bool:
    """The whole response, apart from a fence around it."""
    bare = text.strip().removeprefix("```").removesuffix("```")
    bare = bare[4:] if bare[:4].lower() == "json" else bare
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


@_checks("detectable_format:title")
def _title(text: str) -> bool:
    return any(title.strip("<>").strip() for title in _enclosed(text, "<<", ">>"))


@_checks("combination:two_responses")
def _two_responses(text: str) -> bool:
    """Two different answers parted by six asterisks, which may stand before the first and behind the last, too."""
    parts = [part.strip() for part in text.split("******")]
    answers = [part for part in parts if part]
    return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


@_checks("combination:repeat_prompt")
def _repeats(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_checks("startend:end_checker")
def _ends_with(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_checks("startend:quotation")
def _quoted(text: str) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare.startswith('"') and bare.endswith('"')


@_checks("change_case:capital_word_frequency")
def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _holds(sum(word.isupper() for word in _SPOKEN.findall(text)), capital_relation, capital_frequency)


@_checks("change_case:english_capital")
def _capital(text: str) -> bool:
    return text.isupper() and detect_language(text) == "en"


@_checks("change_case:english_lowercase")
def _lowercase(text: str) -> bool:
    return text.islower() and detect_language(text) == "en"


@_checks("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text


def count_sentences(text: str) -> int:
    """The number of sentences; abbreviations and numbers do not end one, and a rest without an end is one."""
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
    """What stands between two marks on one line; by hand, since a pattern takes quadratic time over marks alone."""
    found = []
    for line in text.split("\n"):
        start = line.find(opening)
        while start >= 0 and (end := line.find(closing, start + len(opening))) >= 0:
            found.append(line[start + len(opening) : end])
            start = line.find(opening, end + len(closing))
    return found
