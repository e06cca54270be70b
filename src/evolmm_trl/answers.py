# Copyright 2026 The evolmm-trl authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""When two answers are the same answer.

The votes among the N answers to one question are counted by `canonical_answer`. Its two errors cost differently: a
pair kept apart loses a vote, a pair wrongly merged is a wrong reward. Where a text can be read in two ways, it is kept
apart.
"""

import re
import unicodedata
from fractions import Fraction


# A longer text is no short answer: it is compared as written. The bound also keeps every loop below short, and every
# number under the least limit of digits that Python's `int()` can be given (640).
LONGEST_ANSWER = 500


def canonical_answer(text: str | None) -> str | None:
    r"""
    Canonical form of an answer: two answers are the same answer exactly when their canonical forms are equal.

    The same answer:

    - text up to case, white space, a leading article, surrounding quotes, brackets and sentence punctuation, Markdown
      emphasis, LaTeX (`\boxed{}`, `\text{}`, `$...$`, `\(...\)`, spaces, escapes), Unicode look-alikes and a leading
      "the answer is";
    - equal numbers, by exact arithmetic: `12`, `12.0`, `+12`, `012`, `twelve`, `24/2`, `1.2e1` and `1.2 \times 10^1`;
      `1,234` and `1234` (commas, or thin and non-breaking spaces, between groups of three); `1 1/2`, `1½`,
      `\frac{3}{2}` and `1.5`. Words are read from zero to twenty;
    - equal quantities: `5cm` and `5.0 cm`, `50%` and `50 percent`, `90°` and `90 degrees`, `$5`, `$5.00` and `5$`;
    - lists and tuples of equal quantities in the same order: `3,5` and `3, 5.0`; `(3,5)` and `(3, 5)`;
    - an option letter in any dress: `B`, `b.`, `(B)`, `B)`, `Option B`.

    Kept apart, among others:

    - a number from the same with a sign, a percent sign, a currency, a unit or an ordinal ending, and from `5!` or
      `5...`;
    - units that differ in case (`MW`, `mW`), except in words that are no symbols (`Years`, `PM`); units are not
      converted;
    - lists in another order, and brackets that mean something: `3, 5`, `(3, 5)`, `[3, 5]` and `{3, 5}`;
    - an option's letter from the letter with its text; `yes` from `true`; `x = 5` from `5`; `1:2` from `1/2`; `1 234`
      with a plain space from `1234`.

    Args:
        text (`str` or `None`):
            The answer as the model wrote it.

    Returns:
        `str` or `None`: The canonical form, which is its own canonical form, or `None` where there is no answer:
        `None`, or nothing but white space and punctuation. A text longer than 500 characters only has its white space
        tidied.

    Examples:

    ```python
    >>> canonical_answer("The answer is $\\frac{10}{4}$.")
    '2.5'
    >>> canonical_answer("(B)")
    'b'
    >>> canonical_answer("-1,234.50 CM")
    '-1234.5 CM'
    ```
    """
    if text is None:
        return None
    # A canonical form must be its own canonical form, and one pass may uncover work for another: repeat until nothing
    # changes. Every pass but the last few shortens the text, so the bound is never met; it is there so that no text can
    # hang a training run.
    for _ in range(2 * LONGEST_ANSWER):
        text = _tidy(text)
        if len(text) > LONGEST_ANSWER or (simpler := _simplify(text)) == text:
            break
        text = simpler
    return text if any(map(_is_content, text)) else None


def _is_content(char: str) -> bool:
    # Mathematical, currency and other symbols can be an answer ("<", "€", "✓"); punctuation and a lone accent cannot.
    return char.isalnum() or unicodedata.category(char) in ("Sm", "Sc", "So")


def _simplify(text: str) -> str:
    text = _unwrap(_plain_latex(_plain_unicode(text)))
    for read in (_option, _quantity, _quantity_list, _tuple):
        if (answer := read(text)) is not None:
            return answer
    return _fold_text(text)


# ---------------------------------------------------------------------------------------------------------------------
# White space, Unicode, LaTeX
# ---------------------------------------------------------------------------------------------------------------------

# Groups of three digits joined by the spaces that typesetters use for it; a plain space might stand between two
# numbers. No match starts inside a longer run of groups, which also keeps the search linear.
_THIN = "\u00a0\u2007\u2008\u2009\u202f"
_THIN_THOUSANDS = re.compile(rf"(?<![\d.,{_THIN}])\d{{1,3}}(?:[{_THIN}]\d{{3}})+(?![{_THIN}]?\d)")


def _tidy(text: str) -> str:
    # The only step that sees a text of any length. Format characters (marks of direction, zero-width spaces) go,
    # control characters count as white space.
    if not (text.isascii() and text.isprintable()):
        categories = ((char, unicodedata.category(char)) for char in text)
        text = "".join(" " if category == "Cc" else char for char, category in categories if category != "Cf")
    text = _THIN_THOUSANDS.sub(lambda match: re.sub(f"[{_THIN}]", "", match[0]), text.replace(r"\,", "\u2009"))
    return " ".join(text.split())


_LOOK_ALIKES = str.maketrans(
    {
        **dict.fromkeys("‐‑‒–—―−", "-"),
        **dict.fromkeys("‘’‚‛‹›′", "'"),
        **dict.fromkeys("“”„‟«»", '"'),
        **dict.fromkeys("⁄∕", "/"),
        **dict.fromkeys("⋅∙", "·"),
        "∗": "*",
    }
)


def _plain_unicode(text: str) -> str:
    if not text.isascii():
        pieces, kind_before = [], ""
        for char in text:
            # NFKC alone would make 10² to 102, 10₂ (base two) to 102 and 1½ to 11/2. In CO₂, CO2 is meant.
            kind = unicodedata.decomposition(char).split(" ")[0]
            if kind == "<super>" and kind_before != kind:
                pieces.append("^")
            elif kind == "<sub>" and kind_before != kind and pieces and not pieces[-1].isalpha():
                pieces.append("_")
            digit = unicodedata.decimal(char, None)  # of any script
            pieces.append(f" {char} " if kind == "<fraction>" else char if digit is None else str(digit))
            kind_before = kind
        text = unicodedata.normalize("NFKC", "".join(pieces)).translate(_LOOK_ALIKES)
    return text.replace("''", '"')


# What stands between braces without braces in it; `\{` is a brace that is shown.
_GROUP = r"\{((?:[^{}\\]|\\.)*)\}"
_FRAC_ARGUMENT = rf"(?: ?{_GROUP}| ?([0-9]))"
# Pandoc's rule: the opening dollar hugs what follows, the closing dollar what precedes and has no digit behind it, so
# that "$5 to $10" stays money.
_MATH = re.compile(r"(?<![\\0-9$])(\${1,2})(?![\s$])((?:[^$\\]|\\.)+)(?<!\s)\1(?![0-9$])")
_BOLD = re.compile(r"(?<!\w)\*\*(?=[^\s*])([^*]+)(?<=[^\s*])\*\*(?!\w)")
_DEGREE = re.compile(r"\^ ?(?:\\circ(?![a-zA-Z])|\{ ?\\circ ?\})|\\degree(?![a-zA-Z])")
_FRAC = re.compile(rf"\\[dtc]?frac{_FRAC_ARGUMENT}{_FRAC_ARGUMENT}")
_COMMAND = re.compile(rf"\\(?![dtc]?frac)([a-zA-Z]+) ?{_GROUP}|([\^_]) ?{_GROUP}")
_FONT = re.compile(r"text(?:bf|it|rm|sf|tt|normal)?|math(?:bf|it|rm|sf|tt)|mbox|operatorname|underline|emph")
_INVISIBLE = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[()\[\]]|\\!(?!$)")
_SPACE = re.compile(r"\\[;: ]|\\q?quad(?![a-zA-Z])")
_SYMBOLS = {"times": "×", "cdot": "·", "div": "÷", "pm": "±", "pi": "π", "infty": "∞"}
_SYMBOL = re.compile(rf"\\({'|'.join(_SYMBOLS)})(?![a-zA-Z])")
_ESCAPED = re.compile(r"\\([%$#&_{}])")


def _plain_latex(text: str) -> str:
    text = _MATH.sub(r"\2", _BOLD.sub(r"\1", text))
    if "\\" in text or "{" in text:
        text = _DEGREE.sub("°", text.replace("{,}", ","))
        before = None
        while text != before:  # from the innermost braces outwards
            before = text
            text = _COMMAND.sub(_plain_command, _FRAC.sub(_plain_frac, text))
        text = _SPACE.sub(" ", _INVISIBLE.sub("", text))
        text = _ESCAPED.sub(r"\1", _SYMBOL.sub(lambda match: _SYMBOLS[match[1]], text))
    return " ".join(text.split())


def _plain_frac(match: re.Match) -> str:
    above, below = (match[1] or match[2] or ""), (match[3] or match[4] or "")
    return f" {_argument(above)}/{_argument(below)} "  # spaces: 2\frac{1}{2} is not 21/2


def _plain_command(match: re.Match) -> str:
    command, content = (match[1], match[2]) if match[1] else (match[3], match[4])
    if _FONT.fullmatch(command):
        return content
    if command in ("boxed", "fbox"):
        return f" {content} "
    if command in ("^", "_", "sqrt"):
        # A space where x^{2}3 would read x^23.
        space = " " if match.string[match.end() : match.end() + 1].isalnum() else ""
        return ("√" if command == "sqrt" else command) + _argument(content) + space
    return f"{command}({content})"


def _argument(content: str) -> str:
    content = content.strip()
    return content if re.fullmatch(r"[+-]?(?:[0-9]+|[^\W\d_]+)", content) else f"({content})"


# ---------------------------------------------------------------------------------------------------------------------
# What stands around an answer
# ---------------------------------------------------------------------------------------------------------------------

_ANSWER_IS = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:(?:final|correct|right|best) )?(?:answer|option|choice)"
    r"(?: is\b ?:?| ?:) ?",
    re.IGNORECASE,
)
# "A" is an article only before a word: in "A", "A B", "A 4", "A = 5" and "A and B" it is a name.
_ARTICLE = re.compile(r"the (?=.)|an? (?!(?:and|or|is|to)\b)(?=[^\W\d_]{2})", re.IGNORECASE)
# Not the point of .5, the comma of ,5 or the dots of ...5.
_LEADING = re.compile(r"(?:[;:]|,(?! ?[0-9])|\.+(?!\.| ?[0-9])) ?")


def _unwrap(text: str) -> str:
    before = None
    while text != before:
        before = text
        for wrapper in (_LEADING, _ANSWER_IS, _ARTICLE):
            if match := wrapper.match(text):
                text = text[match.end() :]
        text = _strip_end(text)
        text = _strip_pair(text)
    return text


def _strip_end(text: str) -> str:
    core = text.rstrip(" .,;:!?")
    end = text[len(core) :].lstrip()
    if end.startswith("!") and re.search(r"(?:[0-9)\]}]|\b[A-Za-z])$", core):
        return core + "!" * (len(end) - len(end.lstrip("!")))  # a factorial
    if ".." in end and core[-1:].isdigit():
        return core + "..."  # 0.333... is not 0.333, and 1, 2, ... not 1, 2
    return core


def _strip_pair(text: str) -> str:
    if len(text) < 2:
        return text
    ends, inner = text[0] + text[-1], text[1:-1]
    if ends in ('""', "''", "``", "**", "__"):
        # Around the whole answer and nothing less; a single one may be feet, inches or a derivative.
        return inner.strip() if text[0] not in inner or inner[0] + inner[-1] == ends and len(inner) > 1 else text
    if ends in ("()", "[]") and not set(inner) & set(",;"):
        depth = 0
        for char in inner:
            depth += (char == ends[0]) - (char == ends[1])
            if depth < 0:  # (x+1)(x-1)
                return text
        return inner.strip() if depth == 0 else text
    return text


# ---------------------------------------------------------------------------------------------------------------------
# What an answer can be. Each reader returns the canonical form, or None for a text of another kind.
# ---------------------------------------------------------------------------------------------------------------------

_OPTION = re.compile(r"(?:(?i:option|choice) )?[(\[]?([A-Za-z])[)\]]?")
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen twenty"
).split()
_CURRENCIES = "$€£¥₹₩"
_QUANTITY = re.compile(
    rf"""
    (?P<sign>[+-]?) [ ]? (?P<currency>[{_CURRENCIES}]?) [ ]? (?P<inner_sign>[+-]?)
    (?:
        (?: (?P<whole>[0-9]{{1,30}}) [ ] )? (?P<above>[0-9]{{1,30}}) [ ]?/[ ]? (?P<below>-?[0-9]{{1,30}})
      | (?P<mantissa> (?: [1-9][0-9]{{0,2}} (?:,[0-9]{{3}})+ | [0-9]+ ) (?:\.[0-9]*)? | \.[0-9]+ )
        (?: (?: [eE] | [ ]?[×xX*·][ ]?10\^ ) (?P<exponent>[+-]?[0-9]+) )?
      | 10\^ (?P<power>[+-]?[0-9]+)
    )
    (?P<unit> [ ]? (?: [^\W\d_] | [°%'"] ) [^,]* | [ ]?[{_CURRENCIES}] )?
    """,
    re.VERBOSE,
)
_PERCENT = re.compile(r"^(?:percent|per cent|pct)\b", re.IGNORECASE)
_DEGREES = re.compile(r"(?:°|(?i:degrees?)) ?([CF]?)")
_TUPLE = re.compile(r"([(\[{])([^()\[\]{}]*,[^()\[\]{}]*)([)\]}])")


def _option(text: str) -> str | None:
    match = _OPTION.fullmatch(text)
    return match[1].lower() if match else None


def _quantity(text: str) -> str | None:
    """`[-][currency]number[%| unit]`, a fraction in lowest terms where no decimal is exact."""
    word, space, rest = text.partition(" ")
    if word.lower() in _NUMBER_WORDS:
        text = f"{_NUMBER_WORDS.index(word.lower())}{space}{rest}"
    match = _QUANTITY.fullmatch(text)
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    unit, currency = match["unit"] or "", match["currency"]
    negative = "-" in (match["sign"], match["inner_sign"])

    if match["above"]:
        whole, above, below = int(match["whole"] or 0), int(match["above"]), int(match["below"])
        # 1/2x may be x/2 or 1/(2x), and 1 3/2 is no mixed number.
        if below == 0 or unit[:1].isalpha() or (match["whole"] and not above < below):
            return None
        value = whole + Fraction(above, below)
        negative ^= value < 0
        number = _fraction(abs(value))
    elif match["mantissa"]:
        number = _decimal(match["mantissa"], int(match["exponent"] or 0))
    else:
        number = _decimal("1", int(match["power"]))

    unit = _DEGREES.sub(r"°\1", unit.strip()) if _DEGREES.fullmatch(unit.strip()) else _PERCENT.sub("%", unit.strip())
    if unit and unit in _CURRENCIES:
        if currency:
            return None
        currency, unit = unit, ""
    sign = "-" if negative and number != "0" else ""
    return _fold_text(f"{sign}{currency}{number}{' ' if unit[:1].isalpha() else ''}{unit}")


def _decimal(mantissa: str, exponent: int) -> str:
    """`mantissa * 10**exponent` on strings: exact, and no work for a large exponent."""
    whole, _, decimals = mantissa.replace(",", "").partition(".")
    digits = (whole + decimals).lstrip("0")
    significant = digits.rstrip("0")
    if not significant:
        return "0"
    exponent += len(digits) - len(significant) - len(decimals)
    point = len(significant) + exponent  # digits before the decimal point
    if 0 <= exponent <= 50:
        return significant + "0" * exponent
    if 0 < point < len(significant):
        return f"{significant[:point]}.{significant[point:]}"
    if -50 <= point <= 0:
        return f"0.{'0' * -point}{significant}"
    return f"{significant}e{exponent}"


def _fraction(value: Fraction) -> str:
    places = value.denominator.bit_length()  # enough for every denominator of twos and fives
    scaled = value * 10**places
    return _decimal(str(scaled.numerator), -places) if scaled.denominator == 1 else str(value)


def _quantity_list(text: str) -> str | None:
    # "1,234, 5" is two numbers, "1,2" and "1, 2,3" have a number behind each comma.
    for separator in (", ", ","):
        items = [_quantity(item.strip()) for item in text.split(separator)]
        if len(items) > 1 and None not in items:
            return ", ".join(items)
    return None


def _tuple(text: str) -> str | None:
    match = _TUPLE.fullmatch(text)
    if match is None:
        return None
    # In brackets a comma separates; with both kinds of comma, as in (1,234, 5), the reading is open.
    items = match[2].split(", " if ", " in match[2] else ",")
    quantities = [None if "," in item else _quantity(item.strip()) for item in items]
    return None if None in quantities else match[1] + ", ".join(quantities) + match[3]


# Words whose case says nothing behind a number: Years, YEARS, PM; but Hz, MB and, since mega is not milli and peta not
# pico, Mbps, Mohm and Pmol keep theirs.
_CASELESS_WORD = re.compile(
    r"\b(?:[AP]M|[A-Z]{5,}|(?!M(?:ohm|amp|[^aeiouy])|P(?:ohm|amp|[^aeiouyhlrs]))[A-Z][a-z]{2,})\b"
)
_STANDALONE_DIGIT = re.compile(r"(?<![^\W_])[0-9]")
# Spacing that says nothing: around a comma with no number behind it, and on both sides of an operator ("5 -3" may be
# two numbers, and "blue - green" is not the colour blue-green).
_FREE_COMMA = re.compile(r" ?,(?! ?[0-9]) ?")
_OPERATOR = re.compile(r"(?<=\S) ([=<>+/×·÷]) (?=\S)|(?<=[0-9%]) ([-:]) (?=[0-9])")


def _fold_text(text: str) -> str:
    # Behind a number a word may be a unit, and then MW is not mW.
    digit = _STANDALONE_DIGIT.search(text)
    start = digit.start() if digit else len(text)
    text = text[:start].casefold() + _CASELESS_WORD.sub(lambda match: match[0].lower(), text[start:])
    return _FREE_COMMA.sub(", ", _OPERATOR.sub(r"\1\2", text))
