"""Scores of one written answer against its reference, in [0, 1]. Imports nothing of ours.

Each function takes (answer, reference, source); the source is the text that the answer is about, which only `sari`
looks at. All but `edit_similarity` fold case and white space first.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence


def fold(text: str) -> str:
    """Lower case, white space folded: how answers are compared (the published metric). Accented letters are the same
    in both of Unicode's forms."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def exact_match(answer: str, reference: str, source: str = "") -> float:
    """1 if both are the same text."""
    return float(fold(answer) == fold(reference))


def first_letter(answer: str, reference: str, source: str = "") -> float:
    """1 if both start with the same character: a choice (A, B, ...) that an explanation follows."""
    return float(fold(answer)[:1] == fold(reference)[:1] != "")


def rouge_l(answer: str, reference: str, source: str = "") -> float:
    """ROUGE-L: F1 of the longest common subsequence of words (aclanthology.org/W04-1013), on the whole text."""
    return _common(fold(answer).split(), fold(reference).split())


def edit_similarity(answer: str, reference: str, source: str = "") -> float:
    """1 - (insertions + deletions) / (characters of both), as written: what rapidfuzz calls `ratio`."""
    return _common(answer.strip(), reference.strip())


def sari(answer: str, reference: str | Sequence[str], source: str) -> float:
    """SARI of a simplification (aclanthology.org/Q16-1029): mean over 1- to 4-grams of F1 of kept, precision of deleted
    and F1 of added n-grams; a ratio of nothing counts 1, as in `evaluate`'s metric of that name. Words are separated by
    white space. reference: one or several."""
    references = [reference] if isinstance(reference, str) else reference
    texts = [fold(text).split() for text in (source, answer, *references)]
    return sum(_sari(*(_ngrams(words, n) for words in texts)) for n in range(1, 5)) / 4


def _common(a: Sequence, b: Sequence) -> float:
    """2 * length of the longest common subsequence / length of both; 1 for two empty ones."""
    if not a and not b:
        return 1.0
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))


def _ngrams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _sari(source: Counter, answer: Counter, *references: Counter) -> float:
    wanted = sum(references, Counter())
    source, answer = (Counter({g: n * len(references) for g, n in grams.items()}) for grams in (source, answer))
    kept, deleted, added = source & answer, source - answer, set(answer) - set(source)
    good = kept & wanted
    keep = _f1(_share(good, kept), _ratio(good.total(), (source & wanted).total()))
    new = added & set(wanted)
    add = _f1(_ratio(len(new), len(added)), _ratio(len(new), len(set(wanted) - set(source))))
    return (keep + _share(deleted - wanted, deleted) + add) / 3


def _share(good: Counter, all: Counter) -> float:
    """Mean over n-grams of how many of their occurrences are good."""
    return _ratio(sum(n / all[g] for g, n in good.items()), len(all))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


TEXT_METRICS: dict[str, Callable[[str, str, str], float]] = {
    function.__name__: function for function in (exact_match, first_letter, rouge_l, edit_similarity, sari)
}
