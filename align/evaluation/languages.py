"""Language detection by script and, where languages share one, by their most frequent words.

For answers of a sentence or more in the thirty languages of IFEval. Deterministic, from tables instead of a trained
model (decision 40).
"""

from __future__ import annotations

import re
from collections import Counter

_SCRIPTS = {
    "arabic": (0x0600, 0x06FF), "bn": (0x0980, 0x09FF), "cyrillic": (0x0400, 0x04FF), "devanagari": (0x0900, 0x097F),
    "el": (0x0370, 0x03FF), "gu": (0x0A80, 0x0AFF), "he": (0x0590, 0x05FF), "ja": (0x3040, 0x30FF),
    "kn": (0x0C80, 0x0CFF), "ko": (0xAC00, 0xD7AF), "ml": (0x0D00, 0x0D7F), "pa": (0x0A00, 0x0A7F),
    "ta": (0x0B80, 0x0BFF), "te": (0x0C00, 0x0C7F), "th": (0x0E00, 0x0E7F), "zh": (0x4E00, 0x9FFF),
}  # fmt: skip
# Frequent words that other languages of the same script do not have, or have less.
_WORDS = {
    "latin": {
        "en": "the and of to is that it for you with this are be as have not was will we they your from i my an or but",
        "de": "der die das und ist nicht ein eine zu den mit von für auf sich dem wir ich sie es auch werden wie im",
        "es": "el los las y es que en un una por para con no se del su como más lo al pero está muy son este la de",
        "fi": "ja on ei se että hän ovat oli mutta kun kuin myös sen tämä niin joka minä voi sinun olla hyvä me mitä",
        "fr": "le les et est un une des que pour dans qui ne pas sur vous je il avec au ce nous plus sont la de du en",
        "it": "il che è di un una per non gli con sono del della si le i più anche questo come ma alla nel ha lo la e",
        "pl": "i w na z się nie jest to że do jak o co dla ale są od po być ma przez tego tym czy oraz jego był",
        "pt": "o os as e é que não um uma para com se do da em por mais como dos das no na ao você são seu sua muito",
        "sw": "na ya wa kwa ni katika za la cha kama hii kuwa hiyo yake huu watu wake pia lakini sana mimi hawa yangu",
        "vi": "và là của có không được cho một những các này người trong với để đã thì khi bạn tôi đó nhiều như về ở",
    },
    "cyrillic": {
        "bg": "и на да се за от че са с не по като ще това към или бъде много един която който със във е в го ги му",
        "ru": "и в не на что с это как по он я для но из к у вы мы было быть все так же или то от его если она бы",
        "uk": "і в не на що з це як та до є я для але із у ви ми бути так або від його якщо вона він та ці який",
    },
    "arabic": {
        "ar": "في من على إلى أن هذا هذه التي الذي هو هي ما لا مع كان عن كل لم قد بين أو ذلك بعد و يا لك أنا",
        "fa": "و در به از که این را با است برای آن یک می خود تا بر هم نیز شود شما ما بود ها هستند کرد اگر یا من",
        "ur": "کے کی کا میں ہے اور سے کو نے پر یہ ہیں کہ اس بھی نہیں ایک وہ جو کر تھا لیے ہم آپ ہو گا کیا",
    },
    "devanagari": {
        "hi": "है के में की और से का को हैं पर यह एक नहीं ने भी कि इस तो हम आप जो वह था लिए कर मैं या ही",
        "mr": "आहे आणि या च्या आहेत हे मी ती तो एक नाही केले होते तुम्ही आम्ही पण साठी त्या हा काही असे मध्ये ला ही",
        "ne": "छ र को मा छन् यो हो पनि लाई ले एक गर्न भएको म हामी त्यो छैन तपाईं गर्ने हुन्छ थियो वा का भने",
    },
}
_DISTINCTIVE_LETTERS = {
    "arabic": {"fa": "پچژگ", "ur": "ٹڈڑںے", "ar": "ةىكي"},
    "cyrillic": {"uk": "іїєґ", "ru": "ыэё", "bg": ""},
    "devanagari": {"mr": "ळ", "hi": "", "ne": ""},
    "latin": {"vi": "ăơưđạảấầẩậắằặẹẻẽếềểệỉịọỏốồổộớờởợụủứừửựỳỵỷỹ", "pl": "ąęłńśźż", "de": "ß", "es": "ñ¿¡", "pt": "ãõ"},
}
_WORDS_PER_LETTER = 0.2
"""weight of a distinctive letter, in words"""
_LATIN = re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]")
_WORD = re.compile(r"[^\W\d_][\w\u0900-\u0dff\u200c]*")
_MAX_CHARACTERS = 20_000


def detect_language(text: str) -> str | None:
    """Return the ISO 639-1 code of the language, or None for a text without letters of a known script."""
    text = text[:_MAX_CHARACTERS].lower()
    letters = Counter(text)
    scripts = Counter({"latin": len(_LATIN.findall(text))})
    for letter, count in letters.items():
        if letter > "\u0370" and letter.isalnum():
            scripts.update({name: count for name, (low, high) in _SCRIPTS.items() if low <= ord(letter) <= high})
    if scripts["ja"] * 5 > scripts["zh"]:  # Japanese mixes Chinese characters in
        scripts["ja"] += scripts.pop("zh", 0)
    script, count = scripts.most_common(1)[0]
    if not count or script not in _WORDS:
        return script if count else None
    words = Counter(_WORD.findall(text))
    scores: dict[str, float] = {
        language: sum(words[word] for word in set(common.split())) for language, common in _WORDS[script].items()
    }
    for language, own in _DISTINCTIVE_LETTERS[script].items():
        scores[language] += _WORDS_PER_LETTER * sum(letters[letter] for letter in own)
    # Without any of these words, Latin letters are taken for English, the first entry.
    return max(scores, key=lambda language: scores[language])
