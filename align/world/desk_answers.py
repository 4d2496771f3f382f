"""Wordings of good and bad answers of the support desk; `{p}` stands for the product, `{v}` for the value."""

from __future__ import annotations

STATEMENTS: dict[str, tuple[str, ...]] = {
    "price": (
        "The {p} costs {v} euros.",
        "The price of the {p} is {v} euros.",
        "You pay {v} euros for the {p}.",
    ),
    "warranty": (
        "The {p} has {v} years of warranty.",
        "The warranty of the {p} is {v} years.",
        "You have {v} years of warranty on the {p}.",
    ),
    "weight": (
        "The {p} weighs {v} kilos.",
        "The weight of the {p} is {v} kilos.",
        "It is {v} kilos for the {p}.",
    ),
    "colour": (
        "The {p} is {v}.",
        "The colour of the {p} is {v}.",
        "We sell the {p} in {v}.",
    ),
    "stock": (
        "The {p} ships within {v} days.",
        "The delivery time of the {p} is {v} days.",
        "We ship the {p} within {v} days.",
    ),
    "returns": (
        "You can return goods within {v} days.",
        "The return period is {v} days.",
        "You have {v} days to send it back.",
    ),
    "postage": (
        "Postage is {v} euros.",
        "You pay {v} euros of postage per parcel.",
        "A parcel costs {v} euros.",
    ),
    "repair": (
        "A repair takes {v} weeks.",
        "Repairs need {v} weeks.",
        "You get it back after {v} weeks.",
    ),
    "student": (
        "Students get {v} percent off.",
        "The student discount is {v} percent.",
        "As a student you save {v} percent.",
    ),
    "voucher": (
        "Vouchers are valid for {v} months.",
        "A voucher expires after {v} months.",
        "You can use it for {v} months.",
    ),
    "reply": (
        "We reply to emails within {v} hours.",
        "You get an answer within {v} hours.",
        "Emails are answered within {v} hours.",
    ),
    "opening": (
        "The hotline opens at {v} o'clock.",
        "You can call us from {v} o'clock.",
        "We answer the phone from {v} o'clock.",
    ),
}

REFUSALS = (
    "I do not know that, so I pass your question on to a colleague.",
    "Our handbook does not say that. I pass your question on.",
    "I do not have that information, and I will ask a colleague.",
    "That is not in my handbook, so I pass it on to a colleague.",
)
GOODBYES = (
    "You are welcome! Have a nice day.",
    "Thank you for your message. Just ask if you need anything.",
    "Happy to help! Just write to us at any time.",
)
BARE_GOODBYES = (
    "OK.",
    "Noted.",
    "All right.",
)

OPENINGS = (
    "Happy to help!",
    "Of course!",
    "Thank you for asking.",
    "Gladly!",
    "Thanks for your question.",
)
SORRY = (
    "I am sorry,",
    "Thank you for asking, but",
    "Sorry about that:",
)
CURT = (
    "Read the page.",
    "Not this again.",
    "Whatever.",
    "Stop asking.",
    "Obviously.",
)
PADDING = (
    "Our shop began as a small stall at the harbour many years ago, and since then we have sold many fine things to "
    "people from near and far who like to come back.",
    "There is a lot that one could say about this, and our colleagues in the warehouse like to talk about it at lunch "
    "whenever the weather is bad and the work is done.",
    "Every item waits in our large hall until somebody takes it home, and we always think that a good thing deserves a "
    "good place and a little care every now and then.",
)
