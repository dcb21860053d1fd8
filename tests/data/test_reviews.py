import random
import re
import time

import pytest

from grade_lightning.data import generate_reviews, grammar_positive, grammar_valid, judge_sentences
from grade_lightning.data.reviews import _draw, _write_review

OPENING = "We watched The Iron Road at home last spring. It is about a nurse from Rome."


@pytest.fixture(scope="module")
def reviews() -> list[tuple[str, int]]:
    return generate_reviews(4_000, seed=3)


def test_judge_calls_every_sentence_what_the_generator_meant() -> None:
    rng = random.Random(0)
    for i in range(5_000):
        opening, opinions = _write_review(i % 2, rng)
        text = " ".join([opening, *(sentence for sentence, _ in opinions)])
        assert judge_sentences(text) == ["neutral", "neutral", *(meant for _, meant in opinions)], text


@pytest.mark.parametrize("symbol", ["positive", "positive_verdict", "negative", "negative_verdict"])
def test_no_sentence_is_of_both_sentiments(symbol: str) -> None:
    rng = random.Random(1)
    sentences = [_draw(symbol, rng, set()) for _ in range(3_000)]
    assert set(judge_sentences(" ".join(sentences))) == {symbol.split("_")[0]}


def test_reviews_are_balanced_unique_and_reproducible(reviews: list[tuple[str, int]]) -> None:
    openings = {" ".join(re.findall(r"[^.]+\.", text)[:2]) for text, _ in reviews}
    assert len(openings) == len(reviews)
    assert sum(label for _, label in reviews) == len(reviews) // 2
    assert generate_reviews(50, seed=3) == reviews[:50]
    assert generate_reviews(50, seed=4) != reviews[:50]


def test_label_is_the_majority_and_some_opinions_disagree(reviews: list[tuple[str, int]]) -> None:
    off = total = 0
    for text, label in reviews:
        kinds = judge_sentences(text)
        counts = [kinds.count("negative"), kinds.count("positive")]
        assert counts[label] > counts[1 - label], text
        off, total = off + counts[1 - label], total + sum(counts)
    assert 0.05 < off / total < 0.15


def test_openings_say_nothing_about_the_label(reviews: list[tuple[str, int]]) -> None:
    words: list[dict[str, int]] = [{}, {}]
    for text, label in reviews:
        for word in set(" ".join(re.findall(r"[^.]+\.", text)[:2]).split()):
            words[label][word] = words[label].get(word, 0) + 1
    for word in words[0].keys() | words[1].keys():
        a, b = (counts.get(word, 0) for counts in words)
        assert abs(a - b) < 5 * (a + b) ** 0.5 + 1, word  # five standard deviations of a fair coin


def test_size(reviews: list[tuple[str, int]]) -> None:
    words = [len(text.split()) for text, _ in reviews]
    assert 35 < sum(words) / len(words) < 60
    assert 350 < len({word for text, _ in reviews for word in re.findall(r"\w+", text)}) < 600
    assert not any(re.search(r"\s[.,!]|  |[{}|]", text) for text, _ in reviews)
    tokens_after_opening = [
        len(re.findall(r"\w+|[.,!]", re.split(r"(?<=\.) ", text, maxsplit=2)[2])) for text, _ in reviews
    ]
    assert sum(n < 48 for n in tokens_after_opening) / len(reviews) > 0.95


def test_judging_is_fast(reviews: list[tuple[str, int]]) -> None:
    judge_sentences("")  # compiles
    start = time.perf_counter()
    grammar_positive([""] * 1_000, [text for text, _ in reviews[:1_000]])
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("sentence", "kind"),
    [
        ("The plot was weak, but the acting was superb.", "positive"),
        ("The plot was superb, but the acting was weak.", "negative"),
        ("The acting was weak, but the plot was superb.", "positive"),
        ("The acting was superb, but the plot was weak.", "negative"),
        ("Although the acting was weak, the plot was superb.", "positive"),
        ("Although the acting was superb, the plot was weak.", "negative"),
        ("Although the plot was never dull, the jokes were hardly good.", "unknown"),
        ("Although the plot was never dull, the jokes were never good.", "negative"),
        ("Although the plot was never good, the jokes were never dull.", "positive"),
        ("The acting was anything but boring.", "positive"),
        ("The acting was far from good.", "negative"),
        ("There was not a single dull scene.", "positive"),
        ("There was not a single good scene.", "negative"),
        ("Nobody could call the music bad.", "positive"),
        ("I did not expect the music to be so bad.", "negative"),
        ("I expected a dull film, but it was never dull.", "positive"),
        ("It was worth the ticket.", "positive"),
        ("It was not worth the ticket.", "negative"),
        ("The plot was not boring at all.", "positive"),
        ("The plot was not good at all.", "negative"),
        ("The plot was good.", "unknown"),  # plain praise needs its adverb: "really good"
        ("the plot was superb.", "unknown"),
        ("The plot was superb superb.", "unknown"),
        ("The plot was superb!", "unknown"),
        ("The plot was superb..", "unknown"),
        ("The plot were superb.", "unknown"),
        ("...", "unknown"),
        ("The plot\nwas  superb.", "positive"),
    ],
)
def test_judge(sentence: str, kind: str) -> None:
    assert judge_sentences(sentence) == [kind]


def test_shuffled_words_are_not_of_the_grammar(reviews: list[tuple[str, int]]) -> None:
    rng = random.Random(0)
    corrupted = []
    for text, _ in reviews[:500]:
        sentence = text.split(". ")[2].rstrip(".!").split()
        rng.shuffle(sentence)
        corrupted.append(" " + " ".join(sentence) + ".")
    assert sum(grammar_valid([OPENING] * 500, corrupted)) < 25
    assert sum(grammar_positive([OPENING] * 500, corrupted)) < 15


def test_rewards_agree_with_the_labels(reviews: list[tuple[str, int]]) -> None:
    labels = [float(label) for _, label in reviews]
    texts = [text for text, _ in reviews]
    assert grammar_positive([""] * len(texts), texts, label=labels) == labels
    assert set(grammar_valid([""] * len(texts), texts)) == {1.0}


@pytest.mark.parametrize(
    ("prompt", "completion", "positive", "valid"),
    [
        (OPENING, " I loved the songs.", 1, 1),
        (OPENING, "I loved the songs.", 1, 1),
        (OPENING, " I loved the songs. The plot was we", 1, 1),
        (OPENING, " I loved the songs. I hated the jokes.", 0, 1),
        (OPENING, " I loved the songs. Songs songs.", 0, 0.5),
        (OPENING, " I loved the songs. I loved the songs.", 0, 1),
        (OPENING, " I loved the songs. I loved the songs. Do not miss it!", 1, 1),
        (OPENING, " It is about a pilot from Rome.", 0, 1),
        (OPENING, "", 0, 1),
        (OPENING, " The plot", 0, 1),
        ("We watched The Iron Road at", " home last spring. Do not miss it!", 1, 1),
        ("We watched The Iron Road at", " plot last spring. Do not miss it!", 0, 0.5),
        ("Do not miss it! The plot", " was superb.", 1, 1),
        ("Do not miss it!", " It is set in Rome and", 0, 1),
    ],
)
def test_rewards_judge_what_ends_in_the_completion(prompt: str, completion: str, positive: float, valid: float) -> None:
    assert grammar_positive([prompt], [completion]) == [positive]
    assert grammar_valid([prompt], [completion]) == [valid]
