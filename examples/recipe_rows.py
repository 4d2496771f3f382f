"""Write small files for the recipes in docs/recipes.md, in the shapes of public ones, from templates of our own.

    python examples/recipe_rows.py recipes

    sentiment_*.tsv      sentence, label 0 or 1             as SST-2
    summaries_*.jsonl    dialogue, summary                  as SAMSum
    translations_*.tsv   English, French                    as Tatoeba's pairs
    friendly_*.jsonl     prompt, completion                 one file for each persona; formal_* is Chinese
    taskmaster.json      conversations at a coffee bar      as Taskmaster; `part=train` and `part=test` divide them
    crosswoz.json        Chinese ones about opening hours   as CrossWOZ
    banking77.csv        text, category                     as banking77, of 8 classes

Of each, `train` and `test` share templates but no row; the test's adjectives and customers are in no training row.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
import sys
from pathlib import Path

GOOD = "wonderful superb charming gripping clever touching delightful brilliant hilarious graceful stunning excellent"
BAD = "dreadful boring clumsy lifeless silly tedious awful terrible painful shallow horrible disappointing"
FILMS = ("this film", "the new comedy", "her second novel", "the whole show", "the story", "the last scene")
VERDICTS = (
    "{thing} is {word} from start to end", "i found {thing} rather {word}", "what a {word} evening : {thing} again",
    "a {word} hour , and {thing} is why", "few things are as {word} as {thing}",
)  # fmt: skip

CUSTOMERS = ("Ann", "Bilal", "Chen", "Dora", "Emil", "Fatima", "Greta", "Hugo", "Ines", "Jonas", "Kofi", "Lena")
GOODS = ("kettle", "lamp", "scarf", "keyboard", "backpack", "tent")
FAULTS = ("is broken", "has not arrived", "is the wrong colour", "is too small")
REMEDIES = {"a refund": "refunds it", "a new one": "sends a new one"}

ENGLISH_FRENCH = (
    ("my order", "ma commande"), ("my parcel", "mon colis"), ("the invoice", "la facture"), ("the key", "la clé"),
    ("the ticket", "le billet"), ("my suitcase", "ma valise"), ("my account", "mon compte"), ("the lamp", "la lampe"),
    ("the room", "la chambre"), ("my phone", "mon téléphone"), ("the menu", "le menu"), ("my coat", "mon manteau"),
)  # fmt: skip
SENTENCES = (
    ("Where is {}?", "Où est {} ?"), ("I cannot find {}.", "Je ne trouve pas {}."),
    ("I would like to see {}.", "Je voudrais voir {}."), ("Can you send me {}?", "Pouvez-vous m'envoyer {} ?"),
    ("I am waiting for {}.", "J'attends {}."), ("Who has {}?", "Qui a {} ?"), ("Here is {}.", "Voici {}."),
    ("I have lost {}.", "J'ai perdu {}."),
)  # fmt: skip

HOURS = {"Monday": "nine", "Tuesday": "ten", "Wednesday": "eleven", "Thursday": "eight", "Friday": "seven"}
PLACES = ("shop", "library", "clinic", "museum", "bank", "pool")
HOURS_ZH = {"周一": "九点", "周二": "十点", "周三": "十一点", "周四": "八点", "周五": "七点"}
PLACES_ZH = ("商店", "图书馆", "诊所", "博物馆", "银行", "泳池")

DRINKS, MILKS = ("mocha", "latte", "cortado", "chai", "macchiato"), ("oat", "soy", "whole", "skimmed")
SIZES = ("small", "large", "huge")
TALK = (
    ("user", "Hello, a {size} {drink} please."), ("assistant", "OK, one {size} {drink}. Which milk would you like?"),
    ("user", "With {milk} milk."), ("assistant", "Your {size} {drink} with {milk} milk will be ready soon."),
    ("user", "Thanks, bye."),
)  # fmt: skip
TALK_ZH = (
    ("usr", "{hello}，请问{place}{day}几点开门？"), ("sys", "{hello}，{place}{day}{hour}开门。"),
    ("usr", "谢谢，再见。"), ("sys", "不客气，祝您在{place}玩得愉快。"),
)  # fmt: skip
INTENTS = {
    "card_arrival": "my new card has not come", "lost_or_stolen_card": "someone took my card",
    "change_pin": "I want a new PIN", "exchange_rate": "what do I get for my euros",
    "top_up_failed": "my top-up did not work", "age_limit": "how old must I be",
    "card_swallowed": "the machine kept my card", "terminate_account": "I want to leave your bank",
}  # fmt: skip
ASKED = (
    "{}", "Hi, {}", "{} and I need help", "Please tell me: {}", "{} !!", "good morning, {}", "{}, what now", "so {}",
)  # fmt: skip

Row = dict[str, str]
Split = tuple[list[Row], list[Row]]
"""rows to train on, and rows to test on"""


def sentiment_rows() -> Split:
    """Return sentences of both classes; the last four adjectives of each are the test's."""
    parts: Split = ([], [])
    for label, words in enumerate((BAD.split(), GOOD.split())):
        for place, word in enumerate(words):
            rows = [{"sentence": verdict.format(thing=thing, word=word), "label": str(label)}
                    for thing, verdict in itertools.product(FILMS, VERDICTS)]  # fmt: skip
            parts[place >= 8].extend(rows)
    return parts


def summary_rows() -> Split:
    """Return conversations at a support desk with a sentence about each; the last four customers are the test's."""
    parts: Split = ([], [])
    for place, name in enumerate(CUSTOMERS):
        for thing, fault, (wish, deed) in itertools.product(GOODS, FAULTS, REMEDIES.items()):
            dialogue = (
                f"{name}: Hello, my {thing} {fault}.\nDesk: I am sorry to hear that. What shall we do?\n"
                f"{name}: I would like {wish}, please.\nDesk: Of course, it is on its way.\n{name}: Thank you!"
            )
            parts[place >= 8].append({"dialogue": dialogue, "summary": f"{name}'s {thing} {fault}; the desk {deed}."})
    return parts


def translation_rows() -> Split:
    """Return English and French sentences; every fifth pair of a noun and a sentence is the test's."""
    parts: Split = ([], [])
    for number, (nouns, sentences) in enumerate(itertools.product(ENGLISH_FRENCH, SENTENCES)):
        english, french = (sentence.format(noun) for sentence, noun in zip(sentences, nouns, strict=True))
        parts[number % 5 == 4].append({"English": english, "French": french})
    return parts


def persona_rows(persona: str) -> Split:
    """Return questions about opening hours with answers in one voice; every fifth question is the test's."""
    english = persona != "formal"
    days, places = (HOURS, PLACES) if english else (HOURS_ZH, PLACES_ZH)
    question = "When does the {place} open on {day}?" if english else "{place}{day}几点开门？"
    answer = {
        "friendly": "Great question! On {day} the {place} opens at {hour}. Have a lovely day!",
        "terse": "At {hour}.",
        "formal": "尊敬的顾客，您好。{place}{day}{hour}开门。感谢您的来信。",
    }[persona]
    parts: Split = ([], [])
    for number, (place, (day, hour)) in enumerate(itertools.product(places, days.items())):
        filled = {"place": place, "day": day, "hour": hour}
        parts[number % 5 == 4 or number % 7 == 3].append(
            {"prompt": question.format(**filled), "completion": answer.format(**filled)}
        )
    return parts


def write_logs(folder: Path) -> None:
    """Write conversations as Taskmaster and CrossWOZ hold them, and a table of classified requests as banking77."""
    orders = [
        [(who, text.format(drink=drink, size=size, milk=milk)) for who, text in TALK]
        for drink, size, milk in itertools.product(DRINKS, SIZES, MILKS)
    ]
    visits = [
        [(who, text.format(hello=hello, place=place, day=day, hour=hour)) for who, text in TALK_ZH]
        for hello, place, (day, hour) in itertools.product(("你好", "您好"), PLACES_ZH, HOURS_ZH.items())
    ]
    taskmaster = [{"utterances": [{"speaker": who, "text": text} for who, text in log]} for log in orders]
    crosswoz = {
        str(number): {"messages": [{"role": who, "content": text} for who, text in log]}
        for number, log in enumerate(visits)
    }
    for name, logs in {"taskmaster.json": taskmaster, "crosswoz.json": crosswoz}.items():
        (folder / name).write_text(json.dumps(logs, ensure_ascii=False), encoding="utf-8")
        sys.stdout.write(f"{folder / name}: {len(logs)} rows\n")
    requests = [(asked.format(said), name) for name, said in INTENTS.items() for asked in ASKED]
    with (folder / "banking77.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("text", "category"), *requests])
    sys.stdout.write(f"{folder / 'banking77.csv'}: {len(requests)} rows\n")


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows as a table with a header, or as lines of JSON."""
    if path.suffix == ".tsv":
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(folder: Path) -> None:
    """Write all files into a folder, their rows in an order that is the same every time."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "sentiment_{}.tsv": sentiment_rows(), "summaries_{}.jsonl": summary_rows(),
        "translations_{}.tsv": translation_rows(),
        **{f"{persona}_{{}}.jsonl": persona_rows(persona) for persona in ("friendly", "terse", "formal")},
    }  # fmt: skip
    for name, parts in files.items():
        for part, rows in zip(("train", "test"), parts, strict=True):
            random.Random(0).shuffle(rows)
            write_rows(folder / name.format(part), rows)
            sys.stdout.write(f"{folder / name.format(part)}: {len(rows)} rows\n")
    write_logs(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "recipes"))
