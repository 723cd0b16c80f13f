r"""Finds the answer in a text and compares it with the reference.

Multiple choice is compared by letter, numbers as exact fractions, words as words. The library
math-verify decides the rest; where it is not installed, the rest is wrong. The strict comparison
comes first because math-verify reads a word as a product of letters ("on" equals "no"), reads
3e8 as 3 * e * 8, and rounds to six decimals (1e-9 equals 0).
"""
import importlib.metadata
import re
import threading
from fractions import Fraction

MAX_LENGTH = 500        # characters; a longer answer is compared as text only
MAX_SECONDS = 3         # for each step of math-verify, whose timeout needs the main thread
# math-verify evaluates 9^{9^9}, 9!!! and sums in full: they are compared as text only.
TOO_LARGE = re.compile(r"\^\W*(?:\d{5}|\d+\W*[\^!])|\^.*!|\d{4}\W*!|!\W*!|[+-][^()]*\)\^\W*\d\d|"
                       r"(?:\)\^\W*\d+\W*){3}|binom.*(?:\d{3}|\^)|[({[|]{20}|\\(?:int|sum|prod|lim)")
# One spelling for what is written in several ways, applied in this order.
SPELLINGS = [(re.compile(pattern), new) for pattern, new in (
    (r"\\!\s*|\\(?:left|right|displaystyle)(?![a-z])", ""), ("[−–]", "-"), (r"\\%", "%"),
    (r"(?<![\w)}])\*\*|\*\*(?![\w({-])", ""), (r"\*\*", "^"), (r"\{,\}", ","),  # bold; 2**3
    ("π", r"\\pi "), ("∞", r"\\infty "), (r"(?:[~\s\x00-\x1f\x7f]|(?<!\\)\\[,;: ])+", " "),
    (r"^ ?(?:\$\$?|\\[([])((?:[^$\\]|\\[^()[\]])*)(?:\$\$?|\\[)\]])\.? ?$", r"\1"),     # \(5\)
    (r"\\\$|^\$(?=[\d.])|^ ?(?:≈|\\approx)|\^ ?(?:\\circ|\{ ?\\circ ?\})|\\degree|°", ""),
    (r"√ ?(?:(\d+(?:\.\d+)?)|\(([^()]*)\))", r"\\sqrt{\1\2}"), (r"\\[dt]frac", r"\\frac"),
    (r" (?![\w\\])|(?<![\w},]) |(?<=,) (?!\d{3}(?!\d))|(?<=\S)\. ?$", ""),  # 1, 200: two numbers
    (r"(?<![\d,.(\[])(?<!\\\{)(\d{1,3}),(\d{3})(?![\d,])", r"\1\2"),                    # 20,000/x
    (r"(?<![\\a-z])(pi|sin|cos|tan|cot|log|ln)(?![a-z])", r"\\\1"), (r"(\d_)\{(\d+)\}", r"\1\2"),
    (r"(?<=\d) ?i\b", " i"),                    # 4i: math-verify looks for i as a word
    (r"(?<=[\d}])( ?[cdlot]|[ghms])$", r"{\1}"))]   # 5t: math-verify takes such a t for a unit
TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox) ?\{([^{}]*)\}")
CHOICE = re.compile(r"(?:[Oo]ption )?\(?([A-J])(?:\)?|[).:(](?! *(?:and|or)\b|.*\b[A-J][):]).*)")
WORDS = re.compile(r"(?=.*[A-Za-z]{2})[A-Za-z' ]+|\d+_\d+")                             # 52_8
NO_UNIT = (r"(?:sin|cos|tan|log|exp|and|or|plus|times|squared|cubed|factorial|dozen|hundred|"
           r"thousand|[mb]illion|half|halve|third|quarter)\w?\b")
UNIT = re.compile(rf"(?<=\d)(?! *{NO_UNIT})(?: *[a-z]{{4,}}| +(?:[a-z]{{3,}}|"
                  r"[ckm]?m|k?g|s|h|k?J|[kMG]?eV|k?Hz|k?Pa))(?:[ /]+[a-z]+)*(?:\^\d)?$")
NUMBER = re.compile(r"(?:\\?[A-Za-z]+=)?([+-]?) *(?:(\d+) +(?=\d+/))?(-?\d+/0*[1-9]\d*|(?=\.?\d)"
                    r"(?:\d{1,3}(?:[, ]\d{3})+|\d*)(?:\.\d*)?(?:[eE][+-]?\d{1,3})?)%?", re.ASCII)


def extract_answer(text: str) -> str | None:
    r"""Returns what the last \boxed{...} holds, else the line after the last `Answer:`, or None."""
    *_, box = [None, *re.finditer(r"\\boxed\s*\{", text)]
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[box.end():]) if box else ():
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[box.end():][:brace.start()].strip()
    *before, tail = re.split(r"answer[\s*]*[:：]\**", text, flags=re.IGNORECASE)
    line = re.match(r"\s*(?:[^\n*\d]* (?=\*\*\S(?:[^\n*]*\S)?\*\*[^\n*]*$))?"    # I see **5** cows
                    r"(\*\*.+?\*\*|\\\[.*?\\\]|\$\$.*?\$\$|[^\n]*)", tail, re.DOTALL | re.MULTILINE)
    return line[1].strip("* \t\r") or None if before else None


def grade(text: str, reference: str) -> bool:
    """Returns whether the answer in `text`, which is what follows the thinking, is right."""
    answer = extract_answer(text)
    return answer is not None and equal(answer, reference)


def equal(answer: str, reference: str) -> bool:
    """Returns whether two answers, in LaTeX or plain text, say the same."""
    if max(len(answer), len(reference)) > MAX_LENGTH:
        return answer.strip() == reference.strip()
    for pattern, new in SPELLINGS:
        answer, reference = pattern.sub(new, answer), pattern.sub(new, reference)
    verdict = strict_equal(*(TEXT.sub(r" \1", text).strip() for text in (answer, reference)))
    if verdict is not None or any(map(TOO_LARGE.search, (answer, reference))):
        return bool(verdict)
    try:
        from math_verify import parse, verify
        seconds = MAX_SECONDS if threading.current_thread() is threading.main_thread() else None
        found, wanted = (parse(text if re.search(r"\$|\\\)| is:? ?[-\d\\]", text) else f"${text}$",
                               parsing_timeout=seconds) for text in (answer, reference))
        return verify(wanted, found, timeout_seconds=seconds)
    except Exception:               # ImportError, or whatever sympy raises
        return False


def strict_equal(answer, reference):
    """Returns the verdict of a comparison without algebra, None where it cannot tell."""
    if letter := re.fullmatch(r"\(?([A-J])\)?", reference):
        choice = CHOICE.fullmatch(answer)
        return bool(choice) and choice[1] == letter[1]
    numbers = [to_number(answer), to_number(reference)]
    if None not in numbers and (numbers[0] == numbers[1] or "%" not in answer + reference):
        return numbers[0] == numbers[1]
    if WORDS.fullmatch(answer) and WORDS.fullmatch(reference):
        return answer.casefold() == reference.casefold()
    return answer == reference != "" or None


def to_number(text):
    r"""Returns the Fraction that a text such as -1,000.5, 2 1/2, 3e8 or \frac{1}{2} is, or None."""
    text = re.sub(r"\\frac ?(?:\{(-?\d+)\}|(\d)) ?(?:\{(\d+)\}|(\d+))", r" \1\2/\3\4", text)
    text = re.sub(r" *(?:\\times|\\cdot|\*) *10\^\{?([+-]?\d+)\}?", r"e\1", text)
    match = NUMBER.fullmatch(UNIT.sub("", text.strip()))
    if not match:
        return None
    value = Fraction(re.sub("[, ]", "", match[3])) + int(match[2] or 0)
    return -value if match[1] == "-" else value


def grader_name() -> str:
    """Returns what decides: "math-verify" and its version, or "strict" where it is missing."""
    try:
        return f"math-verify {importlib.metadata.version('math-verify')}"
    except importlib.metadata.PackageNotFoundError:
        return "strict"
