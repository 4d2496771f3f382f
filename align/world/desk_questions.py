"""Questions of customers to the support desk, in training and held out, and the way people type them.

`{p}` stands for the product, `{q}` for another one. Held-out wordings occur in no training file.
"""

from __future__ import annotations

import random
import re

from align.world.desk_facts import PRODUCTS

QUESTIONS: dict[str, tuple[str, ...]] = {
    "price": (
        "How much does the {p} cost?",
        "What is the price of the {p}?",
        "What do I pay for the {p}?",
        "Could you tell me the price of the {p}?",
        "I want to buy the {p}. What does it cost?",
        "How expensive is the {p}?",
    ),
    "warranty": (
        "How long is the warranty of the {p}?",
        "How many years of warranty does the {p} have?",
        "What warranty comes with the {p}?",
        "For how long is the {p} under warranty?",
        "Does the {p} have a warranty, and for how long?",
    ),
    "weight": (
        "How heavy is the {p}?",
        "What does the {p} weigh?",
        "What is the weight of the {p}?",
        "Could you tell me how much the {p} weighs?",
        "I have to carry the {p} home. How many kilos is it?",
    ),
    "colour": (
        "Which colour is the {p}?",
        "What colour does the {p} have?",
        "In which colour do you sell the {p}?",
        "Could you tell me the colour of the {p}?",
        "I like bright things. What is the colour of the {p}?",
    ),
    "stock": (
        "When can you ship the {p}?",
        "How many days until the {p} ships?",
        "What is the delivery time of the {p}?",
        "How long do I wait for the {p}?",
        "If I order the {p} now, when is it shipped?",
    ),
    "returns": (
        "How long can I return something?",
        "What is the return period?",
        "Until when may I send goods back?",
        "How many days do I have to return my order?",
        "I may not like it. How long can I give it back?",
    ),
    "postage": (
        "How much is the postage?",
        "What does a parcel cost?",
        "What do you charge for shipping?",
        "Could you tell me the shipping costs?",
        "Do I pay for postage, and how much?",
    ),
    "repair": (
        "How long does a repair take?",
        "When do I get my repaired item back?",
        "How many weeks do repairs need?",
        "Mine is broken. How long will the repair be?",
        "What is the usual time for repairs?",
    ),
    "student": (
        "Is there a discount for students?",
        "How much do students save?",
        "What is the student discount?",
        "I am a student. How many percent do I get off?",
        "Do you have a student price?",
    ),
    "voucher": (
        "How long is a voucher valid?",
        "When does my voucher expire?",
        "For how many months can I use a voucher?",
        "I got a voucher. How long can I keep it?",
        "What is the validity of your vouchers?",
    ),
    "reply": (
        "How fast do you answer emails?",
        "When will I get a reply to my email?",
        "How many hours until you answer an email?",
        "I wrote you an email. When do you reply?",
        "How long do you need for an email?",
    ),
    "opening": (
        "When does the hotline open?",
        "From what time can I call you?",
        "At what time does the hotline start?",
        "I want to call tomorrow. When do you open?",
        "What are the opening hours of the hotline?",
    ),
}

HELD_OUT_QUESTIONS: dict[str, tuple[str, ...]] = {
    "price": (
        "What would the {p} set me back?",
        "How many euros do you charge for the {p}?",
        "Is the {p} cheap? What is it sold for?",
    ),
    "warranty": (
        "How many years is the {p} guaranteed for?",
        "If the {p} breaks, how long does the warranty cover it?",
        "Tell me about the warranty on the {p}.",
    ),
    "weight": (
        "How many kilos does the {p} bring to the scales?",
        "Is the {p} a heavy one? I need the weight.",
        "My shelf is weak: what weight has the {p}?",
    ),
    "colour": (
        "Is the {p} blue or what colour is it?",
        "Does the {p} come in a certain colour?",
        "I need to match my kitchen. The {p} is which colour?",
    ),
    "stock": (
        "How soon does the {p} leave your warehouse?",
        "I am in a hurry. How many days does the {p} need to ship?",
        "By when would the {p} be on its way?",
    ),
    "returns": (
        "Say I change my mind, how many days are left for a return?",
        "What is your policy on sending things back, in days?",
        "How late can a return be?",
    ),
    "postage": (
        "What comes on top for shipping?",
        "Is sending a parcel free or what is the postage?",
        "How many euros is delivery by post?",
    ),
    "repair": (
        "My order came to you for repair, how many weeks will that be?",
        "How quickly do you repair things?",
        "Is a repair done in a week or longer?",
    ),
    "student": (
        "My daughter studies. What rebate do students get?",
        "By how much do you lower prices for students?",
        "Can I save something with a student card?",
    ),
    "voucher": (
        "Can I still use a voucher next year? How many months does it last?",
        "How long before vouchers run out?",
        "What is the lifetime of a voucher in months?",
    ),
    "reply": (
        "If I send an email, how many hours will it take you?",
        "What is your response time by email?",
        "Do you answer emails the same day, or how long is it?",
    ),
    "opening": (
        "Since what hour is somebody on the phone in the morning?",
        "How early can I ring the hotline?",
        "Which time in the morning does your hotline begin?",
    ),
}

FOLLOW_UPS: dict[str, tuple[str, ...]] = {
    "price": (
        "And how much is it?",
        "And the price?",
        "OK, what does it cost?",
    ),
    "warranty": (
        "And how long is its warranty?",
        "What about the warranty?",
        "And for how long is it under warranty?",
    ),
    "weight": (
        "And how heavy is it?",
        "What does it weigh?",
        "And its weight?",
    ),
    "colour": (
        "And which colour is it?",
        "What is its colour?",
        "And the colour?",
    ),
    "stock": (
        "And when can you ship it?",
        "How long do I wait for it?",
        "And its delivery time?",
    ),
}

HELD_OUT_FOLLOW_UPS: dict[str, tuple[str, ...]] = {
    "price": (
        "Good, and what would it set me back?",
        "How many euros is that one?",
    ),
    "warranty": (
        "And should it break, how many years of warranty has it?",
        "Fine. Is it guaranteed for long?",
    ),
    "weight": (
        "How many kilos is that one?",
        "Sounds good, but is it heavy? How much?",
    ),
    "colour": (
        "Nice. It comes in what colour?",
        "What colour would that one be?",
    ),
    "stock": (
        "How soon does it leave your warehouse?",
        "And by when would that one be shipped?",
    ),
}

ASIDES = (
    "I already have your {q}. ",
    "My brother bought the {q} from you. ",
    "The {q} is not for me. ",
    "Forget the {q} for now. ",
)
HELD_OUT_ASIDES = (
    "We were so happy with the {q} last year! ",
    "Unlike the {q}, this one is a present: ",
)

OFF_PAGE = (
    "Can the {p} be engraved?",
    "Do you have a shop in Lisbon?",
    "Who designed the {p}?",
    "Is the {p} vegan?",
    "Can I pay with cryptocurrency?",
    "Do you hire people at the moment?",
    "Where is the {p} made?",
    "Does the {p} work under water?",
    "Can my dog come to your shop?",
    "How loud is the {p}?",
    "Do you sell spare parts for the {p}?",
    "Can I rent the {p} for a weekend?",
)
HELD_OUT_OFF_PAGE = (
    "Is the {p} safe for small children?",
    "Do you ship to Iceland?",
    "Who founded your company?",
    "May I pay the {p} in instalments?",
    "How tall is the {p}?",
    "Do you wrap gifts?",
)

CHAT = (
    "Thank you, that was all!",
    "Hello!",
    "You have been very helpful.",
    "Have a nice day!",
    "Good morning!",
    "Great, thanks a lot.",
    "OK, bye then.",
    "That answers my question.",
)
HELD_OUT_CHAT = (
    "Cheers, you made my day.",
    "Hi, anybody there?",
    "Perfect, I am off now.",
    "Much obliged!",
)

_GREETINGS = (
    "Hi, ",
    "Hello, ",
    "Hey, ",
    "Good day. ",
)
_THANKS = (
    " Thanks!",
    " thx",
    " Thank you.",
)


def casual(rng: random.Random, text: str) -> str:
    """Return a question as people type it: a greeting, thanks, lower case, no question mark, a typo."""
    if rng.random() < 0.3 and (greeting := rng.choice(_GREETINGS)):
        text = greeting + (text[0].lower() + text[1:] if greeting.endswith(", ") and text[:2] != "I " else text)
    text = text + rng.choice(_THANKS) if rng.random() < 0.2 else text
    if rng.random() < 0.3:
        text = text.lower().rstrip("?.!")
    return _typo(rng, text) if rng.random() < 0.2 else text


def _typo(rng: random.Random, text: str) -> str:
    """Swap two inner letters of one longer word that is no product."""
    words = [match for match in re.finditer(r"[A-Za-z]{5,}", text) if match[0].lower() not in PRODUCTS]
    if not words:
        return text
    word = rng.choice(words)
    at = word.start() + rng.randrange(1, len(word[0]) - 2)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
