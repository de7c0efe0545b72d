"""Split captions into words as the COCO caption scores do: Penn Treebank tokens, lower-cased, without punctuation.

The published scores are computed on the output of Stanford CoreNLP 3.4.1's ``PTBTokenizer -preserveLines -lowerCase``,
from which the evaluation code then drops a fixed list of punctuation. This module computes the same without Java. Its
rules were found by observing that program; the tests compare against its recorded output and, where Java is there,
against the program itself.

At each character every rule tries its longest match, including what must follow the token. The longest match wins, and
among equally long ones the first. If no rule matches, the character is dropped.

One thing differs: each caption is read alone. The Java program reads all captions as one text, where

- a vertical tab, form feed, carriage return, U+2028 or U+2029 begins a new line, so that every later caption gets
  its neighbour's words (here these are spaces);
- a few rules look into the next line: a caption that ends in "no." before one that begins with a digit, in a single
  letter and a full stop before one that begins with "A", "The" or the like, or in an unclosed tag (``<a b="``);
- and a capital sigma is lower-cased differently if a digit or a letter of another script follows in the word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from mllm.eval.metrics.ptb_grammar import RULES, SPLIT_WORDS

VERSION = "1"

# The list has brackets too (-LRB-), but in capitals, which lower-cased tokens never equal: brackets stay.
_DROPPED = frozenset(["", "''", "'", "``", "`", '"', ".", "?", "!", ",", ":", ";", "-", "--", "---", "----"])

_TOKEN = re.compile("".join(f"(?=(({rule.token})(?:{rule.context}))?)" for rule in RULES))
_ENDS = range(1, 2 * len(RULES), 2)  # the groups of whole matches; each is followed by the group of its token
_PLAIN = re.compile("[ \n]*(?:[A-Za-z]+[ \n]+)+|[ \n]+")  # most of a caption; here all rules agree
_SPLIT = {"".join(pair.split()): pair for pair in SPLIT_WORDS}
_NEW_LINES = str.maketrans("\n\v\f\r\u2028\u2029", "      ")


@lru_cache(maxsize=2**18)
def tokenize(caption: str) -> str:
    """Return the caption's tokens joined by spaces; a few (fractions, telephone numbers) hold no-break spaces."""
    tokens = _tokens(caption.translate(_NEW_LINES) + "\n")
    return " ".join(token for token in tokens if token not in _DROPPED).rstrip()


def _tokens(text: str) -> Iterator[str]:
    """Yield the tokens of a text that ends in a line feed, as they are written."""
    position = 0
    while position < len(text):
        if plain := _PLAIN.match(text, position):
            yield from (_SPLIT.get(word, word) for word in plain[0].lower().split())
            position = plain.end()
        else:
            token, length = _first(text[position:])
            yield token
            position += length


@lru_cache(maxsize=2**16)  # captions end alike
def _first(text: str) -> tuple[str, int]:
    """Return the first token, as it is written, and how many characters it takes."""
    match = _TOKEN.match(text)
    assert match is not None  # every rule is optional
    best = max(_ENDS, key=match.end)
    if match.end(best) < 0:
        return "", 1  # no token begins with this character
    return RULES[best // 2].write(match[best + 1]).lower(), match.end(best + 1)
