"""The support desk's data sets as JSON lines: conversations over a handbook page in the system message.

A row says what its last turn is (`kind`) and what a good answer states (`topic`, `product`, `truth`), for the judge.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from align.schema import Messages, assistant, user
from align.world import desk_answers, desk_questions
from align.world.desk_facts import HELD_OUT_PRODUCTS, PRODUCTS, TOPICS, Fact, Page, write_page
from align.world.desk_instructions import instruction_row
from align.world.desk_judge import ExpectedAnswer, Kind

SHARES: dict[Kind, int] = {"fact": 6, "distractor": 3, "follow_up": 4, "unknown": 5, "chat": 2}
"""rows of each kind among twenty"""

Row = dict[str, Any]


@dataclass(frozen=True)
class Manner:
    """The style of an answer; the default is the best one."""

    right: bool = True
    """the true value, or the refusal where the page has none"""
    refuses: bool = False
    """says that it does not know although the page does"""
    evades: bool = False
    """says something kind and answers nothing"""
    tone: str = "courteous"
    """courteous, bare, or curt"""
    long: bool = False


@dataclass(frozen=True)
class DeskChat:
    """A conversation up to the customer's last turn, and what a good answer to it states."""

    page: Page
    turns: Messages
    expected: ExpectedAnswer

    @property
    def prompt(self) -> Messages:
        """The conversation with the page as its system message."""
        return [{"role": "system", "content": self.page.text}, *self.turns]


@dataclass(frozen=True)
class DeskSizes:
    """Rows of each data set."""

    sft: int = 320
    preference: int = 208
    preference_eval: int = 40
    prompts: int = 400
    prompts_eval: int = 100
    instructions: int = 40
    prose: int = 26


def write_desk(folder: str | Path, seed: int = 0, sizes: DeskSizes = DeskSizes()) -> dict[str, Path]:
    """Write every data set of the support desk below a folder; equal seeds give equal bytes.

    Files named eval use wordings and products that occur in none of the others.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[random.Random, Kind], Row]] = {
        "sft": demonstration_row,
        "preference": preference_row,
        "preference_eval": partial(preference_row, held_out=True),
        "prompts": prompt_row,
        "prompts_eval": partial(prompt_row, held_out=True),
        "instructions": lambda rng, kind: instruction_row(rng),
    }
    paths = {name: folder / f"{name}.jsonl" for name in makers} | {"prose": folder / "prose.jsonl"}
    for name, make_row in makers.items():
        rng = random.Random(f"{seed}/desk/{name}")
        kinds = [kind for kind, share in SHARES.items() for _ in range(share)]
        rows: list[Row] = []
        order: list[Kind] = []
        while len(rows) < getattr(sizes, name):
            order = order or rng.sample(kinds, len(kinds))
            rows.append(make_row(rng, order.pop()))
        _write_rows(paths[name], rows)
    paragraphs = Path(__file__).with_name("prose.txt").read_text(encoding="utf-8").strip().split("\n\n")
    _write_rows(paths["prose"], [{"text": paragraph} for paragraph in paragraphs[: sizes.prose]])
    return paths


def _write_rows(path: Path, rows: list[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def demonstration_row(rng: random.Random, kind: Kind) -> Row:
    """Return a conversation as a busy desk leaves them: often bare or long, at times wrong or bluffed."""
    chat = converse(rng, kind)
    tone = rng.random()
    manner = Manner(
        right=rng.random() >= (0.4 if kind == "unknown" else 0.1),
        tone="curt" if tone < 0.05 else "bare" if tone < 0.5 else "courteous",
        long=rng.random() < 0.2,
    )
    return {"messages": [*chat.prompt, assistant(answer(rng, chat, manner))], "kind": kind}


_REJECTED = (
    *[Manner(right=False)] * 6, Manner(refuses=True), Manner(tone="curt"), *[Manner(tone="bare")] * 2,
    *[Manner(long=True)] * 2, *[Manner(evades=True)] * 3,
)  # fmt: skip


def preference_row(rng: random.Random, kind: Kind, *, held_out: bool = False) -> Row:
    """Return a pair in the same words: the best answer against one with a single fault."""
    chat, state = converse(rng, kind, held_out=held_out), rng.getrandbits(32)
    fault = rng.choice([one for one in _REJECTED if _can_have(chat.expected, one)])
    good, bad = (answer(random.Random(state), chat, manner) for manner in (Manner(), fault))
    return {"prompt": chat.prompt, "chosen": [assistant(good)], "rejected": [assistant(bad)], "kind": kind}


def _can_have(expected: ExpectedAnswer, fault: Manner) -> bool:
    """Return whether a fault is one there: nothing to refuse where nothing is known, nothing to evade in a chat."""
    return not (fault.refuses and not expected.truth) and not (fault.evades and expected.kind == "chat")


def prompt_row(rng: random.Random, kind: Kind, *, held_out: bool = False) -> Row:
    """Return a conversation without an answer, with what the judge needs."""
    chat = converse(rng, kind, held_out=held_out)
    return {"prompt": chat.prompt, **asdict(chat.expected)}


def converse(rng: random.Random, kind: Kind, *, held_out: bool = False) -> DeskChat:
    """Return a conversation of a kind; held-out ones use wordings and products of their own."""
    products = HELD_OUT_PRODUCTS if held_out else tuple(name for name in PRODUCTS if name not in HELD_OUT_PRODUCTS)
    page = write_page(rng, products)
    if kind == "chat":
        text = rng.choice(desk_questions.HELD_OUT_CHAT if held_out else desk_questions.CHAT)
        before = _exchange(rng, page, rng.choice(page.facts), held_out) if rng.random() < 0.7 else []
        return DeskChat(page, [*before, user(text)], ExpectedAnswer("chat"))
    if kind == "follow_up":
        return _follow_up(rng, page, held_out)
    if kind == "unknown" and rng.random() < 0.4:
        product = rng.choice(page.products)
        text = rng.choice(desk_questions.HELD_OUT_OFF_PAGE if held_out else desk_questions.OFF_PAGE).format(p=product)
        return DeskChat(page, [user(desk_questions.casual(rng, text))], ExpectedAnswer("unknown", "", product))
    fact = _missing(rng, page, products) if kind == "unknown" else rng.choice(page.facts)
    bank = desk_questions.HELD_OUT_QUESTIONS if held_out else desk_questions.QUESTIONS
    text = rng.choice(bank[fact.topic]).format(p=fact.product)
    if kind == "distractor":
        other = rng.choice([name for name in products if name != fact.product])
        aside = rng.choice(desk_questions.HELD_OUT_ASIDES if held_out else desk_questions.ASIDES)
        text = aside.format(q=other) + text
    return DeskChat(
        page, [user(desk_questions.casual(rng, text))], ExpectedAnswer(kind, fact.topic, fact.product, fact.value)
    )


def _follow_up(rng: random.Random, page: Page, held_out: bool) -> DeskChat:
    """Return two questions: the second leaves the product out, and a fourth of them the page does not answer."""
    of_products = [fact for fact in page.facts if fact.product]
    first = rng.choice([one for one in of_products if sum(one.product == other.product for other in of_products) > 1])
    facts = {fact.topic: fact for fact in of_products if fact.product == first.product and fact is not first}
    bank = desk_questions.HELD_OUT_FOLLOW_UPS if held_out else desk_questions.FOLLOW_UPS
    topic = rng.choice(sorted(facts)) if rng.random() < 0.75 else rng.choice(sorted(bank.keys() - {first.topic}))
    fact = facts.get(topic)
    expected = ExpectedAnswer("follow_up" if fact else "unknown", topic, first.product, fact.value if fact else "")
    text = desk_questions.casual(rng, rng.choice(bank[topic]))
    return DeskChat(page, [*_exchange(rng, page, first, held_out), user(text)], expected)


def _exchange(rng: random.Random, page: Page, fact: Fact, held_out: bool) -> Messages:
    """Return a question that a page answers, and its best answer."""
    asked = DeskChat(page, [], ExpectedAnswer("fact", fact.topic, fact.product, fact.value))
    bank = desk_questions.HELD_OUT_QUESTIONS if held_out else desk_questions.QUESTIONS
    text = rng.choice(bank[fact.topic]).format(p=fact.product)
    return [user(text), assistant(answer(rng, asked, Manner()))]


def _missing(rng: random.Random, page: Page, products: tuple[str, ...]) -> Fact:
    """Return a fact without a value that the page does not have: of a product on it, of another one, or a policy."""
    known = {(fact.topic, fact.product) for fact in page.facts}
    other = rng.choice([name for name in products if name not in page.products])
    choices = [
        (name, product)
        for name, topic in TOPICS.items()
        for product in ((*page.products, other) if topic.of_product else ("",))
    ]
    return Fact(*rng.choice([choice for choice in choices if choice not in known]), "")


def answer(rng: random.Random, chat: DeskChat, manner: Manner) -> str:
    """Return an answer in a manner; wordings are sampled first, so that equal states of `rng` differ in faults."""
    expected = chat.expected
    topic = expected.topic or rng.choice(sorted(TOPICS))
    statement, refusal = rng.choice(desk_answers.STATEMENTS[topic]), rng.choice(desk_answers.REFUSALS)
    opening, sorry, curt, padding = (
        rng.choice(bank)
        for bank in (desk_answers.OPENINGS, desk_answers.SORRY, desk_answers.CURT, desk_answers.PADDING)
    )
    goodbye, bare = rng.choice(desk_answers.GOODBYES), rng.choice(desk_answers.BARE_GOODBYES)
    value = expected.truth if expected.truth and manner.right else _wrong_value(rng, chat, topic)
    product = expected.product or rng.choice(chat.page.products)
    body = statement.format(p=product, v=value)
    silent = manner.refuses or (expected.kind == "unknown" and manner.right)
    if manner.evades or (expected.kind == "chat" and manner.right):
        sentences = [goodbye if manner.tone == "courteous" else bare]
    elif silent:
        # "I" stays a capital behind a comma, everything else does not.
        body = refusal if refusal.startswith("I ") or sorry.endswith(":") else refusal[0].lower() + refusal[1:]
        sentences = [f"{sorry} {body}" if manner.tone == "courteous" else refusal]
    else:
        sentences = [f"{opening} {body}" if manner.tone == "courteous" else body]
    sentences = [curt, *sentences] if manner.tone == "curt" else sentences
    return " ".join([*sentences, padding] if manner.long else sentences)


def _wrong_value(rng: random.Random, chat: DeskChat, topic: str) -> str:
    """Return a value of the topic's unit that is not the true one, from the page if it has some."""
    unit, truth = TOPICS[topic].unit, chat.expected.truth
    near = [fact.value for fact in chat.page.facts if TOPICS[fact.topic].unit == unit and fact.value != truth]
    return (
        rng.choice(near) if near and rng.random() < 0.7 else rng.choice([v for v in TOPICS[topic].values if v != truth])
    )
