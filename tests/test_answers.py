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

import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evolmm_trl import answers
from evolmm_trl.answers import LONGEST_ANSWER, canonical_answer


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------

SAME = {
    "case": ["Dark Blue", "dark blue", "DARK BLUE"],
    "sharp s": ["Straße", "STRASSE"],
    "leading article": ["cat", "a cat", "A cat", "The cat", "the  cat."],
    "an before a vowel": ["an apple", "apple"],
    "quotes and punctuation": [
        "blue", '"Blue"', "“blue”", "'blue.'", "«blue»", "blue!", "blue,", ": blue", "(blue)",
        "`blue`",
    ],
    "white space": ["dark blue", " dark\tblue\n", "dark\u00a0blue", "dark\u2003blue", "dark\x00blue"],
    "marks that do not show": ["blue", "\u200eblue\u200f", "bl\u200bue", "\ufeffblue"],
    "Markdown": ["5", "**5**", "*5*", "`5`", "__5__", "**Answer:** 5", "**Answer: 5**", "The answer is **5**."],
    "the answer is": [
        "5", "Answer: 5", "the answer is 5", "So, the final answer is: $5$.",
        "The correct answer is \\(5\\)",
    ],
    "the answer is below zero": ["-5", "The answer is -5.", "Answer: −5"],
    "trailing zeros and point": ["12", "12.0", "12.", "12.00", "12.000 "],
    "leading zeros": ["12", "012", "0012.0"],
    "no whole part": [".5", "0.5", "00.50", "+.5", ".5."],
    "explicit plus": ["5", "+5", "+ 5"],
    "minus signs": ["-5", "−5", "–5", "- 5", "－５", "\u20105", "(-5)", "$-5$"],
    "zero": ["0", "-0", "+0", "0.00", "-0.0", "zero", "0e7", "0/5"],
    "commas between thousands": ["1234567", "1,234,567", "1,234,567.0", "1{,}234{,}567"],
    "thin spaces between thousands": ["1234", "1\u2009234", "1\u202f234", "1\u00a0234", "1\\,234", "1,234"],
    "digits of other scripts": ["2015", "２０１５", "٢٠١٥", "२०१५"],
    "number words": ["20", "twenty", "Twenty.", "TWENTY"],
    "number words with a unit": ["5 dogs", "five dogs", "Five Dogs"],
    "a half": [
        "1/2", "0.5", "½", "2/4", ".5", "\\frac{1}{2}", "\\dfrac{1}{2}", "\\tfrac12", "\\frac{2}{4}", "1 / 2",
        "1∕2",
    ],
    "a third": ["1/3", "2/6", "⅓", "\\frac{1}{3}", "$\\frac{ 3 }{ 9 }$"],
    "below zero": ["-0.5", "-1/2", "-½", "-\\frac{1}{2}", "\\frac{-1}{2}", "\\frac{1}{-2}"],
    "mixed numbers": ["1.5", "1 1/2", "1½", "1 ½", "1\\frac{1}{2}", "3/2"],
    "whole fractions": ["2", "4/2", "\\frac{10}{5}"],
    "scientific": [
        "1500", "1.5e3", "1.5E+3", "1.5 \\times 10^3", "1.5×10³", "1.5 x 10^{3}", "1.5·10^3",
        "1.5 \\cdot 10^3",
    ],
    "small scientific": ["0.0015", "1.5e-3", "1.5×10⁻³", "1.5 \\times 10^{-3}"],
    "powers of ten": ["100", "10^2", "10²", "10^{2}"],
    "huge exponents": ["1e999999999", "10e999999998", "0.1e1000000000", "10^999999999"],
    "many zeros": ["1e60", "1" + "0" * 60, "0.1e61"],
    "percent": ["50%", "50 %", "50.0%", "50 percent", "50 Percent", "50 per cent", "50\\%", "$50\\%$", "５０％"],
    "percent of a fraction": ["0.5%", "½%", "1/2 %"],
    "currency": ["$5", "\\$5", "$5.00", "$ 5", "5$", "$\\$5$", "＄5"],
    "currency below zero": ["-$5", "$-5", "−$5.00"],
    "units": ["5 cm", "5cm", "5.0 cm", "5  cm.", "+5 cm", "5\\text{ cm}", "5\\,\\mathrm{cm}", "$5$ cm", "five cm"],
    "squared units": ["5 m^2", "5 m²", "5\\text{ m}^2", "5\\,\\text{m}^{2}"],
    "micro": ["5 μm", "5 µm"],
    "degrees": ["90°", "90 °", "90 degrees", "90 Degrees", "90^\\circ", "90^{\\circ}", "90\\degree"],
    "degrees Celsius": ["25 °C", "25°C", "25℃", "25 degrees C"],
    "words for units": ["5 years", "5 Years", "5 YEARS"],
    "time of day": ["12:30 PM", "12:30 pm"],
    "lists": ["3, 5", "3,5", "3 , 5", "3.0, 5.", "three, five", "3，5"],
    "lists with thousands": ["1234, 5", "1,234, 5"],
    "lists of quantities": ["50%, 5 cm", "50 percent, 5cm"],
    "tuples": ["(3, 5)", "(3,5)", "(3.0, 5)", "\\left(3, 5\\right)"],
    "lists of words": ["red, blue", "Red,Blue", "red , blue"],
    "option letters": [
        "B", "b", "(B)", "B.", "B)", "[B]", "Option B", "option (B)", "**B**", "B:", "\\boxed{B}",
        "\\text{(B)}",
    ],
    "option a": ["A", "a", "(A)", "A.", "a)", "Option A", "Ⓐ", "⒜"],
    "yes": ["yes", "Yes.", "YES!", " yes "],
    "boxes": [
        "5", "\\boxed{5}", "$\\boxed{5}$", "\\boxed{\\text{5}}", "\\boxed{\\boxed{5}}", "\\fbox{ 5 }",
        "\\underline{5}", "$$5$$", "\\[5\\]",
    ],
    "box around a fraction": ["0.5", "\\boxed{\\frac{1}{2}}", "$\\boxed{\\dfrac{1}{2}}$"],
    "fraction of expressions": ["(x+1)/2", "\\frac{x+1}{2}", "\\boxed{\\frac{x+1}{2}}"],
    "roots": ["5√2", "5\\sqrt{2}", "$5\\sqrt{2}$"],
    "symbols": ["2π", "2\\pi", "$2\\pi$"],
    "spaces around operators": ["x=5", "x = 5", "\\(x = 5\\)"],
    "ranges": ["2010-2015", "2010 – 2015", "2010–2015"],
    "inches": ['5"', "5″", "5''", "5.0 ″"],
    "subscripts of formulas": ["CO2", "CO₂"],
}  # fmt: skip


@pytest.mark.parametrize("texts", SAME.values(), ids=SAME)
def test_same_answers_have_one_canonical_form(texts):
    assert None not in map(canonical_answer, texts)
    assert len({canonical_answer(text) for text in texts}) == 1, {text: canonical_answer(text) for text in texts}


# Every two texts of a row are different answers.
DIFFERENT = {
    "sign": ["5", "-5", "--5", "+-5"],
    "point": ["5", ".5", "...5", ",5", "0.05"],
    "percent": ["50", "50%", "-50%", "0.5", "50‰", "50 percentage points"],
    "comma and point": ["12", "1,2", "1.2", "1 2"],
    "thousands": ["1,234", "1.234", "1 234", "(1,234)", "1, 234"],
    "thin space and other groups": ["1\u20092345", "12345"],
    "tuples with thousands": ["(1,234, 5)", "(1234, 5)", "(1, 234, 5)"],
    "quotes that do not belong together": ["'5' or '7'", "5' or '7"],
    "plain space and other groups": ["100200", "100 200", "100, 200"],
    "yes, no": ["yes", "no", "cannot", "not", "true", "false"],
    "option and word": ["A", "a cat", "an"],
    "option and text": ["(B)", "B. a bird", "a bird"],
    "options": ["A", "B", "A B", "A and B", "A or B", "A, B", "B, A"],
    "number after a letter": ["4", "A 4"],
    "fractions": ["1/2", "12", "1/3", "2/1", "1:2", "1-2", "1,2"],
    "mixed numbers": ["1 1/2", "11/2", "1/2", "1 3/2", "5/2"],
    "mixed number in LaTeX": ["2\\frac{1}{2}", "21/2", "2/1"],
    "vulgar fraction": ["1½", "11/2", "1"],
    "ambiguous denominators": ["1/2x", "\\frac{1}{2}x", "2x"],
    "no fraction": ["1/0", "1", "0", "2/0"],
    "ordinal": ["5", "5th", "5 s"],
    "time and versions": ["12:30", "1230", "12.30", "1.2.3", "123", "1.23"],
    "and": ["3 and 5", "35", "3, 5", "3-5"],
    "list order": ["3, 5", "5, 3", "3", "5"],
    "brackets": ["3, 5", "(3, 5)", "[3, 5]", "{3, 5}", "[3, 5)"],
    "currency": ["5", "$5", "€5", "-$5", "5 cents", "$5 million", "$5 to $10", "5 to 10"],
    "money range": ["$5-$10", "5-10", "$5-10"],
    "units": ["5", "5 cm", "5 m", "5 m^2", "5 m^3", "-5 cm", "0.5 cm"],
    "case of units": ["5 MW", "5 mW", "5 Mw"],
    "bits and bytes": ["5 Mb", "5 MB", "5 mb"],
    "mega and milli, longer": ["5 Mbps", "5 mbps", "5 MBps"],
    "mega and milli, words": ["5 Mohm", "5 mohm"],
    "units inside text": ["about 5 MW", "about 5 mW"],
    "units behind another word": ["5 million MW", "5 million mW"],
    "degrees": ["25°C", "25°F", "25°", "25"],
    "feet and inches": ["5", "5'", '5"', "6'5\""],
    "powers": ["10^2", "102", "10²³", "10₂", "10^{2}3", "10^3"],
    "powers of a letter": ["x^{2}3", "x^{23}", "x^2", "x2"],
    "exponents": ["1e999999999", "1e999999998", "-1e999999999", "1e-999999999", "0"],
    "factorials": ["5", "5!", "5!!", "5\\!", "120"],
    "factor before a box": ["2\\boxed{3}", "23"],
    "two currencies": ["$5€", "$5", "€5"],
    "dots": ["0.333", "0.333...", "1/3"],
    "sequence goes on": ["1, 2, 3", "1, 2, 3, ..."],
    "signs without a number between them": ["<", ">", "=", "+"],
    "comparison": ["5", "<5", ">5", "≤5", "~5", "±5"],
    "equation": ["x = 5", "5", "x = -5"],
    "brackets that do not belong together": ["(x+1)(x-1)", "x+1)(x-1", "(x+1)"],
    "spaces on one side": ["5 - 3", "5 -3"],
    "colour or range": ["blue-green", "blue - green"],
    "sets of numbers and options": ["\\mathbb{R}", "R"],
    "number words": ["seven", "seventeen", "sixteen", "twenty", "twenty-one", "one"],
    "hexadecimal": ["0x1F", "0", "1F", "31"],
}  # fmt: skip


@pytest.mark.parametrize("texts", DIFFERENT.values(), ids=DIFFERENT)
def test_different_answers_have_different_canonical_forms(texts):
    assert len({canonical_answer(text) for text in texts}) == len(texts), {t: canonical_answer(t) for t in texts}


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "  \n\t",
        "...",
        "?!",
        "-",
        "()",
        '""',
        "\u200f\u200b",
        "\x00",
        "**",
        "Answer:",
        "The answer is",
        "\ud800",
    ],
)
def test_no_answer_is_none(text):
    assert canonical_answer(text) is None


@pytest.mark.parametrize("text", ["A", "a", "A.", "(a)", "the", "0", "<", "€", "no", "是", "✓"])
def test_the_shortest_answers_are_answers(text):
    assert canonical_answer(text) is not None


@pytest.mark.parametrize(
    "text, expected",
    [
        ("-1,234.50", "-1234.5"),
        ("2/6", "1/3"),
        ("(B)", "b"),
        ("50 percent", "50%"),
        ("-$ 5.00", "-$5"),
        ("5.0CM", "5 CM"),
    ],
)
def test_the_canonical_form_is_plain_to_read(text, expected):
    assert canonical_answer(text) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Properties
# ---------------------------------------------------------------------------------------------------------------------

FRAGMENTS = [
    *"0123579ABxemK.,;:!?+-−–*/^_%$€°'\"`~|<=>()[]{}\\ ½²₂①㎡ßİΐſŉﷺ",
    "\u00a0", "\u2009", "\u200f", "\x00", "\ud800", "\u0301", "...", "''", "**", "$$", "234", "1,234", "e9", "10^",
    "×10^", "\\boxed{", "\\frac{", "\\frac12", "\\text{", "\\sqrt{", "}{", "\\{", "\\}", "\\$", "\\%", "\\,",
    "\\!", "\\ ", "\\(", "\\)", "\\circ", "\\times", "\\left(", "{,}", "a ", "an ", "The ", "Answer: ",
    "answer is ", "option ", " and ", "cm", "MW", "PM", "Years", " percent", "degrees", "five", "Twenty", "zero ",
]  # fmt: skip
junk = st.text() | st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join)

integers = st.integers(-(10**12), 10**12)
decimals = st.builds("{}.{:0>3}".format, integers, st.integers(0, 999))
fractions = st.builds("{}/{}".format, integers, st.integers(1, 999)) | st.builds(
    "\\frac{{{}}}{{{}}}".format, integers, st.integers(1, 999)
)
numbers = integers.map(str) | integers.map("{:,}".format) | decimals | fractions
numbers |= st.builds("{}e{}".format, decimals, st.integers(-(10**9), 10**9))
quantities = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "$", "€", "-", "+"]),
    numbers,
    st.sampled_from(["", "%", " cm", "MB", "°", "'", " Years"]),
)
options = st.builds(
    "{}{}{}".format, st.sampled_from(["", "(", "Option "]), st.sampled_from("ABab"), st.sampled_from(["", ")", "."])
)
wrappers = st.sampled_from(
    ["{}", "${}$", "\\boxed{{{}}}", "({})", "[{}]", '"{}"', "**{}**", "The answer is {}.", "the {}", "{}!"]
)
lists = st.lists(quantities, min_size=1, max_size=4).map(", ".join)
structured = st.builds(
    lambda outer, inner, text: outer.format(inner.format(text)), wrappers, wrappers, quantities | options | lists
)


@settings(max_examples=500, deadline=None)
@given(junk | structured)
def test_a_canonical_form_is_its_own_canonical_form(text):
    canonical = canonical_answer(text)
    assert canonical_answer(canonical) == canonical


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_no_text_raises(text):
    assert canonical_answer(text) is None or isinstance(canonical_answer(text), str)


@st.composite
def written_numbers(draw):
    """A number and one of the ways to write it."""
    value = Fraction(
        draw(st.integers(-30, 30)) * draw(st.sampled_from([1, 10, 1000])), draw(st.sampled_from([1, 2, 3, 4, 10]))
    )
    ways = [f"{value.numerator}/{value.denominator}", f"\\frac{{{2 * value.numerator}}}{{{2 * value.denominator}}}"]
    if value.denominator != 3:
        ways += [f"{float(value):.2f}", f"{float(value):,.3f}", f"{float(value):.6e}", f"$${float(value):+.4f}$$"]
    if value.denominator == 1:
        ways += [str(value), f"{int(value):,}", f"{value}."]
    return value, draw(st.sampled_from(ways)).replace("-", draw(st.sampled_from("-−")))


@settings(max_examples=500, deadline=None)
@given(written_numbers(), written_numbers())
def test_written_numbers_are_the_same_answer_exactly_when_they_are_equal(first, second):
    assert (canonical_answer(first[1]) == canonical_answer(second[1])) == (first[0] == second[0])


@settings(deadline=None)
@given(written_numbers())
def test_every_way_to_write_a_number_is_read_as_that_number(written):
    value, text = written
    assert Fraction(canonical_answer(text)) == value


@settings(deadline=None)
@given(
    integers,
    integers,
    st.sampled_from(["{}", "{:,}", "{}%", "${}", "{} cm", "({})", "x = {}", "\\boxed{{{}}}", "about {}"]),
)
def test_different_integers_stay_different_in_the_same_dress(first, second, dress):
    assume(first != second)
    assert canonical_answer(dress.format(first)) != canonical_answer(dress.format(second))


@settings(deadline=None)
@given(numbers, st.sampled_from(["{}%", "${}", "{} cm", "x = {}", "{}th"]))
def test_a_number_is_never_the_same_with_something_that_changes_it(number, dress):
    assert canonical_answer(dress.format(number)) != canonical_answer(number)


@settings(deadline=None)
@given(st.integers(1, 10**30), st.sampled_from(["{}", "{:,}", "{}%", "${}", "{} cm", "{}e-7", "{}/7", ".{}"]))
def test_a_sign_is_never_lost(number, dress):
    text = dress.format(number)
    assert canonical_answer("-" + text) != canonical_answer(text)


@settings(deadline=None)
@given(st.lists(st.integers(-99, 99), min_size=2, max_size=5), st.randoms())
def test_lists_are_the_same_answer_exactly_in_the_same_order(items, random):
    other = random.sample(items, len(items))
    first, second = ", ".join(map(str, items)), ",".join(f"{item}.0" for item in other)
    assert (canonical_answer(first) == canonical_answer(second)) == (items == other)


# ---------------------------------------------------------------------------------------------------------------------
# Long texts
# ---------------------------------------------------------------------------------------------------------------------

PIECES = [
    "(", "[", "{", "\\boxed{", "\\frac{", "\\frac{1}", "\\text{a}", "^{", "\\", "$", "$a ", "**a", "*", "'", '"',
    "!", ".", ". ", "1,", "\u2009234", "1,234", "1\u2009234", "9", "0", "1/2 ", "e9", "- ", "½", "²", "the ", "a ",
    "A B ", "answer is ", "()", "(a)", " ", "\u0315\u0300", "\u200f", "\x00", "\ud800", "ﷺ",
]  # fmt: skip


@pytest.mark.parametrize("length", [LONGEST_ANSWER, 100_000])
@pytest.mark.parametrize("piece", PIECES, ids=ascii)
def test_junk_takes_less_than_a_second(piece, length):
    body = (piece * length)[:length]
    for text in (body, body[: LONGEST_ANSWER - 1] + "5", "5" + body, body + "9", " " * length + body + "!"):
        start = time.process_time()
        canonical = canonical_answer(text)
        assert time.process_time() - start < 1
        assert canonical_answer(canonical) == canonical


@pytest.mark.parametrize("opening, closing", [("(", ")"), ("\\boxed{", "}"), ('"', '"'), ("\\text{(", ")}")])
def test_deep_nesting_is_unwrapped_to_the_last_layer(opening, closing):
    depth = (LONGEST_ANSWER - 1) // len(opening + closing)
    assert canonical_answer(opening * depth + "5" + closing * depth) == "5"


@pytest.mark.parametrize("text", ["9" * LONGEST_ANSWER, "9" * 300_000, "0." + "1" * 300_000, "1e" + "9" * 300_000])
def test_numbers_of_many_digits_are_compared_digit_by_digit(text):
    assert canonical_answer(text) == canonical_answer(f" {text}\n")
    assert canonical_answer(text) != canonical_answer(text[:-1] + "8")


def test_a_long_text_is_only_tidied():
    text = "The Answer  is\n" + "Blue " * LONGEST_ANSWER
    assert canonical_answer(text) == " ".join(text.split())


@pytest.mark.parametrize("text", ["ΐ", "ŉ", "İ", '"(the $\\frac{1}{2}$)"', "\\boxed{\\text{Answer: (B)}}", "ﷺ"])
def test_a_short_answer_settles_in_two_passes(text, monkeypatch):
    passes = []
    simplify = answers._simplify
    monkeypatch.setattr(answers, "_simplify", lambda text: passes.append(text) or simplify(text))
    canonical_answer(text)
    assert len(passes) <= 2


def test_white_space_does_not_make_an_answer_long():
    assert canonical_answer(" " * 10_000 + "5.0" + "\u200f\n" * 10_000) == "5"


def test_the_module_needs_nothing_but_the_standard_library():
    # -S: without site-packages; run as a file: without the package.
    subprocess.run([sys.executable, "-S", "-I", Path(answers.__file__)], check=True)
