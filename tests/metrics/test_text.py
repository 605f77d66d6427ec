"""Scores of written answers: values that others publish, and the slow way to compute them."""

import itertools
import random

import pytest

from hf_jumplora.metrics.text import TEXT_METRICS, edit_similarity, exact_match, first_letter, fold, rouge_l, sari


def longest_common(a, b):
    """Of all subsequences of `a`, the longest that is one of `b`."""

    def inside(part, whole):
        rest = iter(whole)
        return all(item in rest for item in part)

    parts = itertools.chain.from_iterable(itertools.combinations(a, n) for n in range(len(a), -1, -1))
    return len(next(part for part in parts if inside(part, b)))


def test_sari_of_the_published_example():
    """The value that the metric of that name in the library `evaluate` documents, 26.953601953601954."""
    source = "About 95 species are currently accepted ."
    references = [
        "About 95 species are currently known .",
        "About 95 species are now accepted .",
        "95 species are now accepted .",
    ]
    assert sari("About 95 you now get in .", references, source) == pytest.approx(0.26953601953601954, abs=1e-12)


def test_sari_of_one_reference():
    assert sari("the small cat", "the small cat", "the tiny cat") == 1
    copied = sari("the tiny cat", "the small cat", "the tiny cat")
    assert 0 < copied < 1  # nothing is added or deleted: what is kept counts


@pytest.mark.parametrize("seed", range(20))
def test_common_subsequences(seed):
    """Of words and of characters, against the enumeration of all of them."""
    draw = random.Random(seed)
    a, b = (draw.choices("abc", k=draw.randint(1, 8)) for _ in range(2))
    expected = 2 * longest_common(a, b) / (len(a) + len(b))
    assert edit_similarity("".join(a), "".join(b)) == pytest.approx(expected)
    assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)


def test_edit_similarity_of_the_published_example():
    """fuzzywuzzy's own: ratio("this is a test", "this is a test!") = 97; case counts."""
    assert round(100 * edit_similarity("this is a test", "this is a test!")) == 97
    assert edit_similarity("A", "a") == 0


def test_answers():
    assert exact_match(" 42\n", "42") == 1
    assert exact_match("42.0", "42") == 0
    assert first_letter("B. Because it rains", "b\nBecause of that") == 1
    assert first_letter("", "") == 0
    assert fold(" A\tb ") == "a b"
    assert rouge_l("", " ") == edit_similarity(" ", "") == 1


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_bounds(name):
    """1 for the reference itself, and for nothing a number, not an error."""
    assert TEXT_METRICS[name]("the small cat", "the small cat", "the tiny cat") == 1
    assert 0 <= TEXT_METRICS[name]("", "the small cat", "the tiny cat") < 1
