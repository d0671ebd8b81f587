"""How right one reply is, from 0 to 1: exact match, VQA accuracy, relaxed accuracy, ANLS, multiple choice."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vtr.data.choices import LETTERS, Choices, normalized, picked
from vtr.limits import similar

RIGHT = 0.5
"""A score from here on counts as right where right or wrong is asked for."""


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        score: (reply, answers, choices) → 0 … 1.
        problem: (answers, choices) → why such a sample cannot be scored, or None.
    """

    name: str
    score: Callable[[str, Sequence[str], Choices], float]
    problem: Callable[[Sequence[str], Choices], str | None] = lambda answers, choices: None


# -- exact match -------------------------------------------------------------------------------------------------------
def exact(reply: str, answers: Sequence[str], choices: Choices = None) -> float:
    """1 if the :func:`normalized` reply equals one of the answers, else 0."""
    return float(normalized(reply) in {normalized(answer) for answer in answers})


# -- VQA accuracy ------------------------------------------------------------------------------------------------------
COUNTED = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = {"none": "0", **{word: str(n) for n, word in enumerate(COUNTED)}}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe() -> dict[str, str]:
    table = {"somebody'd": "somebodyd"}  # as the official table has it
    for word in CONTRACTIONS.split():
        table.update({word[:i] + word[i + 1 :]: word for i, char in enumerate(word) if char == "'"})
    return table


RESTORED = _without_one_apostrophe()


def vqa_normalized(text: str) -> str:
    """The official VQA normalisation: punctuation, number words, articles, contractions; lower case.

    As in ``vqaEval.py`` of the VQA release (processPunctuation, then processDigitArticle).
    """
    text = re.sub(r"[\n\t]", " ", text).strip()
    out, numeric = text, re.search(r"\d,\d", text) is not None
    for char in PUNCTUATION:
        glued = char + " " in text or " " + char in text or numeric
        out = out.replace(char, "" if glued else " ")
    out = re.sub(r"(?!<=\d)\.(?!\d)", "", out)
    words = (NUMBERS.get(word, word) for word in out.lower().split())
    return " ".join(RESTORED.get(word, word) for word in words if word not in ARTICLES)


def vqa(reply: str, answers: Sequence[str], choices: Choices = None) -> float:
    """VQA accuracy (Antol et al., ICCV 2015): the mean over each person left out of min(matches of the others / 3, 1).

    Reply and answers are both normalised fully, as the EvalAI server and LLaVA's evaluation do; the first release of
    the official script left agreed answers alone and trusted the others' number words and articles.
    """
    said, people = vqa_normalized(reply), [vqa_normalized(answer) for answer in answers]
    matches = people.count(said)
    left_out = (matches - (person == said) for person in people)
    return sum(min(n / 3, 1.0) for n in left_out) / len(people)


def _too_few_people(answers: Sequence[str], choices: Choices) -> str | None:
    if len(answers) >= 4:
        return None
    return f"VQA accuracy needs the answers of several people (the data sets have 10), this sample has {len(answers)}"


# -- relaxed accuracy --------------------------------------------------------------------------------------------------
TOLERANCE = 0.05


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed(reply: str, answers: Sequence[str], choices: Choices = None) -> float:
    """ChartQA's relaxed accuracy (Masry et al., 2022): numbers within 5 %, other answers equal.

    As in pix2struct's ``relaxed_correctness``: percentages are fractions; a true answer of 0 must be met as text; case
    does not matter. The best of several answers counts.
    """
    said = _number(reply)
    for answer in answers:
        true = _number(answer)
        if said is not None and true:
            if abs(said - true) / abs(true) <= TOLERANCE:
                return 1.0
        elif reply.strip().lower() == answer.strip().lower():
            return 1.0
    return 0.0


# -- ANLS --------------------------------------------------------------------------------------------------------------
THRESHOLD = 0.5


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions that make ``b`` of ``a``."""
    row = list(range(len(b) + 1))
    for i, char in enumerate(a, 1):
        fresh = [i]
        for j, (diagonal, above) in enumerate(pairwise(row), 1):
            fresh.append(min(above + 1, fresh[-1] + 1, diagonal + (char != b[j - 1])))
        row = fresh
    return row[-1]


def anls(reply: str, answers: Sequence[str], choices: Choices = None) -> float:
    """One sample's part of ANLS (Biten et al., ICCV 2019): 1 − NL if NL < 0.5, else 0; the best answer counts.

    NL is the edit distance over the longer text's length, case and runs of spaces aside. (Some scripts let NL = 0.5
    pass; the paper does not.)
    """
    said, best = " ".join(reply.lower().split()), 0.0
    for answer in answers:
        true = " ".join(answer.lower().split())
        distance = edit_distance(said, true) / max(len(said), len(true), 1)
        best = max(best, 1 - distance if distance < THRESHOLD else 0.0)
    return best


# -- multiple choice ---------------------------------------------------------------------------------------------------
def choice(reply: str, answers: Sequence[str], choices: Choices = None) -> float:
    """1 if the reply :func:`picked` the right choice (named by its letter or text), else 0."""
    return float((said := picked(reply, choices)) is not None and said in {picked(a, choices) for a in answers})


def _no_choice(answers: Sequence[str], choices: Choices) -> str | None:
    if any(picked(answer, choices) is not None for answer in answers):
        return None
    return f"the answer {answers[0]!r} is none of the choices {list(choices or [])}"


OPENING = re.compile(r"(?:\(|option |the answer is )?(.)")


def mmstar(reply: str, answers: Sequence[str], choices: Choices = None) -> float:
    """1 if the reply begins as MMStar's evaluation wants it: ``b…``, ``(b…``, ``option b…`` or ``the answer is b…``.

    Case, outer spaces and line breaks aside. Whatever comes behind the letter is not looked at, so "a dog" is the
    choice A, and a choice's text is no answer: :func:`choice` is stricter about letters and takes texts.
    """
    said = reply.lower().strip().replace("\n", " ")
    letters = {LETTERS[i].lower() for answer in answers if (i := picked(answer, choices)) is not None}
    return float(said[:1] in letters or ((found := OPENING.match(said)) is not None and found[1] in letters))


# -- by name -----------------------------------------------------------------------------------------------------------
def listing(reply: str, answers: Sequence[str], choices: Choices = None) -> float:
    """Order-free F1 of the objects named by the pocket model's long answers, all their properties right."""
    from vtr.pocket.listing import f1

    return max(f1(reply, answer) for answer in answers)


def _fitting(answers: Sequence[str], choices: Choices) -> Metric:
    return METRICS["exact" if choices is None else "choice"]


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact", exact),
        Metric("vqa", vqa, _too_few_people),
        Metric("relaxed", relaxed),
        Metric("anls", anls),
        Metric("choice", choice, _no_choice),
        Metric("mmstar", mmstar, _no_choice),
        Metric("listing", listing),
        Metric("auto", lambda r, a, c: _fitting(a, c).score(r, a, c), lambda a, c: _fitting(a, c).problem(a, c)),
    )
}
"""``auto`` is ``choice`` for samples that have choices and ``exact`` for others."""


def metric(name: str) -> Metric:
    """The metric called ``name``.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}{similar(name, METRICS)}; choose one of {', '.join(METRICS)}")
    return METRICS[name]


# -- MMStar ------------------------------------------------------------------------------------------------------------
def gain(seen: float, no_image: float) -> float:
    """Multi-modal gain (MMStar, Chen et al., NeurIPS 2024, arXiv 2403.20330): S_v − S_wv.

    Args:
        seen: S_v, the model's accuracy with pictures. no_image: S_wv, the same model's without any.
    """
    return seen - no_image


def leakage(no_image: float, base_lm: float | None) -> float | None:
    """Multi-modal leakage (MMStar): max(0, S_wv − S_t), what training with pictures taught a model to answer unseen.

    Args:
        no_image: S_wv, as in :func:`gain`. base_lm: S_t, the accuracy of the language model that the model was made
            of. Where it is not known (None), neither is the leakage (None).
    """
    return None if base_lm is None else max(0.0, no_image - base_lm)
