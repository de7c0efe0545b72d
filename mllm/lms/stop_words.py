"""Tell content words from stop words: English function words, which say little about an image."""

from __future__ import annotations

import re

_LIST = """
a an the this that these those some any each every either neither no none such all both half other another others
own same much many more most few fewer less least several enough
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
herself it its itself they them their theirs themselves one ones oneself who whom whose which what whoever
whatever someone somebody something anyone anybody anything everyone everybody everything nobody nothing
about above across after against along alongside amid among amongst around as at before behind below beneath
beside besides between beyond by despite down during except for from in inside into like near of off on onto out
outside over past per since through throughout till to toward towards under underneath until unto up upon via
with within without
and but or nor so yet if because although though unless while whereas whether than lest
am is are was were be been being have has had having do does did doing done can could may might must shall should
will would ought isn't aren't wasn't weren't haven't hasn't hadn't don't doesn't didn't can't couldn't won't
wouldn't shouldn't i'm you're he's she's it's we're they're there's that's s t
here there where when how why then now also too very just only even ever never not still again almost already
quite rather really perhaps maybe however therefore thus else elsewhere somewhere anywhere everywhere nowhere
once away apart together
"""
STOP_WORDS = frozenset(_LIST.split())  # determiners, pronouns, prepositions, conjunctions, auxiliaries, adverbs
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def content_words(text: str) -> list[str]:
    """Return the words of a text that are no stop words, in order, without punctuation."""
    return [word for word in _WORD.findall(text) if not is_stop_word(word)]


def is_stop_word(word: str) -> bool:
    """Whether a word is an English function word, in any case."""
    return word.strip().lower().replace("’", "'") in STOP_WORDS
