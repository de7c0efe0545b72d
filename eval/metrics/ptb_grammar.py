"""The rules of the PTB tokeniser: what a token looks like, and what must follow it.

Names in capitals are building blocks, as in a grammar. They describe what the Java program was observed to do, oddities
included; most of those concern rare input, but captions of the web are full of rare input.
"""

from __future__ import annotations

import re

from mllm.eval.metrics.ptb_characters import COMBINING, DIGITS, LETTERS, SYMBOLS


def _any(words: str) -> str:
    """Return a pattern for any of the words in either case; a bracketed set stays in the case given."""
    cased = re.sub(r"(\[[^]]*\])", r"(?-i:\1)", "|".join(words.split()))
    return f"(?i:{cased})"


SPLIT_WORDS = ("can not", "gon na", "got ta", "lem me", "gim me", "wan na")  # cannot, gonna, ...
SPACE_NL = r"[ \t\n\u00a0\u2000-\u200a\u3000]"
APOS = r"(?:['\u0092\u2019]|(?i:&apos;))"
APOS_LIKE = rf"(?:{APOS}|[`\u0091\u2018\u201b])"
HYPHEN = r"[-_\u058a\u2010\u2011]"
AMPERSAND = rf"(?:&|{_any('&amp;')})"

LETTER = rf"(?:[{LETTERS}{COMBINING}\u00ad]|&[aeiouAEIOU]{_any('acute grave uml')};)"
WORD_PART = rf"{LETTER}(?:{LETTER}|[{DIGITS}])*"
WORD = rf"{WORD_PART}(?:[.!?]{WORD_PART})*"
REDUCED = rf"{APOS}(?:[msdMSD]|{_any('re ve ll')})"  # 's, 're
NOT = rf"[nN]{APOS_LIKE}[tT]"

# Words with an apostrophe that stay whole: d', 'n', ma'am, O'Neil, Hawai'i.
ELIDED = (
    rf"{APOS}n{APOS}?|[lLdDjJ]{APOS}|{_any('Dunkin somethin ol')}{APOS}|{APOS}{_any('em tills? till? cause')}|{APOS}[2-9]0s"
    rf"|[A-HJ-XZn]{APOS_LIKE}[{LETTERS}]{{2,}}|[{LETTERS}]+[aeiouyAEIOUY]{APOS_LIKE}[aeiouA-Z][{LETTERS}]*"
    rf"|{_any('cont')}{APOS}{_any('d[.]')}"
)

NUMBER = rf"(?:[{DIGITS}]*(?:[.:,\u00ad\u066b\u066c][{DIGITS}]+)+|[{DIGITS}]+)"
SLASH = r"(?:\\?/|\u2044)"
FRACTION = rf"(?:[{DIGITS}]{{1,4}}[- \u00a0])?[{DIGITS}]{{1,4}}{SLASH}[{DIGITS}]{{1,4}}"
DATE = rf"[{DIGITS}]{{1,2}}[-/][{DIGITS}]{{1,2}}[-/][{DIGITS}]{{2,4}}"
SCRIPTS = r"[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)"
PHONE = (
    r"(?:\([0-9]{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])"
    r"[0-9]{3,4}[- \u00a0]?[0-9]{3,5}|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}"
)

NAME = r"[A-Za-z][A-Za-z0-9_:.-]*"
ATTRIBUTES = rf"(?:[ ]+{NAME}(?:[ ]*=[ ]*['\"][^\r\n'\"]*['\"])?)*"
TAG = rf"<(?:[!?][A-Za-z-][^>\r\n]*|{NAME}{ATTRIBUTES}[ ]*/?|/{NAME})[ ]*>"

PATH_END = r'[^ \t\n\f\r"<>|.!?(){},-]'
PATH = rf'[^ \t\n\f\r"<>|()]+{PATH_END}'
HOST_PART = r"""[^ \t\n\f\r"`'<>|!?(){},-_$]+\."""  # ,-_ is a range: full stop, digits and capitals are in it
SITE = rf"""(?:{_any("www")}\.(?:[^ \t\n\f\r"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}|(?:{HOST_PART})+{_any("com net org edu")})"""
MAIL_PART = r'[^ \t\n\f\r"<>|().\u00a0]+'
MAIL = rf'(?:<|&lt;)?[a-zA-Z0-9][^ \t\n\f\r"<>|()\u00a0]*@(?:{MAIL_PART}\.)*{MAIL_PART}(?:>|&gt;)?'
FILE_TYPES = """bat bmp c class cgi cpp dll docx? exe gif gz h html? jar java jpe?g mov mp3 pdf php pl png ppt ps py sql
    tar txt wav x xml zip"""

# Compounds: x-ray, 24/7, AT&T, T-1,000. The second elements of the third and fourth are plain ASCII.
ELISION = rf"(?:[dDoOlL]{APOS_LIKE}[{LETTERS}])?"
JOINED = rf"{ELISION}[{LETTERS}{DIGITS}]+(?:{HYPHEN}{ELISION}[{LETTERS}{DIGITS}]+)*"
CAPITALS = rf"[A-Z]+(?:(?:\+|{AMPERSAND})[A-Z]+)+"
HALF = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
SLASHED = rf"{HALF}(?:\\?/{HALF}){{1,2}}"
ACRONYM = rf"{_any('Canada Sino Korean EU Japan non')}-{_any('U[.]S')}|{_any('U[.]S[.]-U[.]K U[.]S[.]-U[.]S[.]S[.]R')}"
HYPHENATED = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:(?:[A-Za-z](?:\.[A-Za-z])+|{ACRONYM})\.|[A-Za-z0-9\u00ad]+))+"

# Abbreviations that keep their full stop.
ABBREVIATIONS = """Mr Mrs Ms [M]iss Drs? Profs? Sens? Reps? Attys? Lt Col Gen Messrs Govs? Adm Rev Maj Sgt Cpl Pvt Capt
    Ste? Ave Pres Lieut Hon Brig Co?mdr Pfc Spc Supts? Det Mme Mlle Msgr Insp Asst Assoc Sfc Adj Adv Ens Jr Sr Bros Esq
    Ph (?:Ed|Ph)[.]D Blvd Rd Bldg Ft Mt Rt Sq Est Ext Etc Seq Tel Treas Vs Alex Wm Jos Al Cf
    Ala Ariz [A]z [A]rk Calif Colo Conn Ct Dak [D]el Fla Ga [I]ll Ind Kans? Ky [L]a [M]ass Md Mich Minn Mo Mont Neb Nev
    Okla [O]re [P]a Penn Tenn [T]ex Va Vt [W]ash Wisc? Wyo
    Inc Cos? Corp P[Pp]?t[ye]s? Ltd Plc Bancorp Dept Bhd Assn Univ Intl Sys Invt Elec Natl M[ft]g Cie
    Mon Tues? Wed Thu Thurs Fri Jan Feb Mar Apr Jun Jul Aug Sept? Oct Nov Dec"""
BEFORE_NUMBERS = "art ca figs? nos? op ph? pp prop"

SMILEY = r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]"
FACE = r"""[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)"""
FIXED = rf"C\.D\.s|pro-|anti-|S{AMPERSAND}P-500|S{AMPERSAND}Ls|Cap{APOS}n|c{APOS}est|C\+\+|[CF]#|-[LR][RCS]B-"
ENTITY = rf"&(?:{_any('HT TL UR LR QC QL QR odq cdq')}|#[0-9]+);"
DOTS = r"\.{3,5}|(?:\.[ \u00a0]){2,4}\.|[\u0085\u2026]"
QUOTE = rf"{APOS}|''|[`\u2018\u2019\u201b\u201c\u201d\u0091-\u0094\u2039\u203a\u00ab\u00bb]{{1,2}}|\"|{_any('&quot;')}"
DASH = rf"{_any('&MD; &mdash; &ndash;')}|[\u0096\u0097\u2013\u2014\u2015]"
SIGN = rf"{_any('&lt; &gt;')}|[<>{{}}()\[\]=+%&~^|/\\,;:.$#\u0080\u00a2-\u00a4\u20a0\u20ac\u00bc-\u00be\u2153\u2154{SYMBOLS}]"
REPEATED = r"-+|[?!]+|\*+|(?:\\\*){1,3}|@+|#+|_+|<<|>>"

# (token, what must follow it), in order of precedence.
RULES: tuple[tuple[str, str], ...] = (
    *((_any(first), _any(last)) for first, last in map(str.split, SPLIT_WORDS)),
    ("'[tT]", _any("is was")),
    (TAG, ""),
    (DASH, ""),
    (AMPERSAND, ""),
    (ENTITY, ""),
    (WORD, REDUCED),
    (r"[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", NOT),
    (WORD, ""),
    (ELIDED, ""),
    (f"[yY]{APOS}", f"[{LETTERS}]"),
    (rf"{_any('https?')}://{PATH}", ""),
    (f"(?:{SITE})(?:/{PATH})?", ""),
    (MAIL, ""),
    (rf"@[A-Za-z_][A-Za-z_0-9]*|#{LETTER}(?:{LETTER}|[{DIGITS}])*", ""),
    (REDUCED, "[^A-Za-z]"),
    (NOT, "[^A-Za-z]"),
    (DATE, ""),
    (rf"[-+]?{NUMBER}", ""),
    (SCRIPTS, ""),
    (FRACTION, ""),
    (FIXED, ""),
    (SLASHED, ""),
    (r"[A-Z]+\$", ""),
    (SMILEY, "[^A-Za-z0-9]"),
    (FACE, ""),
    (REPEATED, ""),
    (DOTS, ""),
    (HYPHENATED, ""),
    (CAPITALS, ""),
    (JOINED, ""),
    (rf"{APOS}[0-9][0-9]", SPACE_NL),
    (rf"(?:{_any(ABBREVIATIONS)}|[A-Za-z](?:\.[A-Za-z])*|{ACRONYM})\.", ""),
    (rf"{_any(BEFORE_NUMBERS)}\.", f"{SPACE_NL}?[{DIGITS}]"),
    (rf"[{LETTERS}{DIGITS}]+(?:\.[{LETTERS}{DIGITS}]+)*\.{_any(FILE_TYPES)}", ""),
    (PHONE, ""),
    (QUOTE, ""),
    (SIGN, ""),
)
