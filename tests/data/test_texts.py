import pytest

from grade_lightning.data import opening
from grade_lightning.data.texts import Keys, keys_of, split_rows, text_of
from grade_lightning.errors import InputError


@pytest.mark.parametrize(
    ("text", "max_chars", "expected"),
    [
        ("One. Two. Three.", 100, "One. Two."),
        ("One. Two. Three.", 9, "One. Two."),
        ("One. Two. Three.", 8, "One."),
        ("One.\n\n  Two.\tThree.", 100, "One. Two."),
        ("No end", 100, "No end"),
        ("No end", 4, "No"),
        ("Endless", 4, "Endl"),
        ("Four more", 4, "Four"),
        ('"Really?" he said. Yes.', 17, '"Really?"'),
        (
            "Dr. No met Mr. T. in the U.S. (e.g. there). Why? So.",
            100,
            "Dr. No met Mr. T. in the U.S. (e.g. there). Why?",
        ),
        ("Wow!!! It cost 3.50 dollars... Fine.", 100, "Wow!!! It cost 3.50 dollars..."),
    ],
)
def test_opening(text: str, max_chars: int, expected: str) -> None:
    assert opening(text, max_chars) == expected


def keys(*texts: str) -> Keys:
    return Keys(texts, [text[0] for text in texts])


@pytest.mark.parametrize("seed", range(5))
def test_no_text_and_no_prompt_in_two_splits(seed: int) -> None:
    train = keys(*(f"{prompt}{i % 7}" for prompt in "abcdefghijklmnopqrst" for i in range(10)))
    test = keys("a0", "a0", "b9", "z0")
    sizes = {"validation": 8, "prompts": 12, "reward": 10}
    rows, dropped = split_rows(train, test, sizes, None, seed)
    assert {name: len(numbers) for name, numbers in rows.items()} == {"test": 3, **sizes}
    texts = [(test if name == "test" else train).texts[i] for name, numbers in rows.items() for i in numbers]
    assert len(set(texts)) == len(texts)
    prompts = [{(test if name == "test" else train).prompts[i] for i in numbers} for name, numbers in rows.items()]
    assert sum(map(len, prompts)) == len(set().union(*prompts))
    assert dropped["duplicate"] == 20 * 3 + 1
    assert dropped["in_test"] == 1
    assert dropped["same_prompt"] > 0
    assert split_rows(train, test, sizes, None, seed) == (rows, dropped)
    assert split_rows(train, test, sizes, None, seed + 1).rows != rows


def test_shared_prompt_stays_in_the_earlier_split() -> None:
    rows, dropped = split_rows(keys("a1", "a2", "b1"), None, {"validation": 1, "prompts": 2}, None, seed=0)
    assert len(rows["validation"]) == 1
    assert dropped == {"in_test": 0, "duplicate": 0, "same_prompt": 3 - 1 - len(rows["prompts"])}


def test_texts_are_compared_without_surrounding_whitespace() -> None:
    assert len(set(keys_of({"text": ["A b.", " A b.\n"]}, 100).texts)) == 1
    assert len(set(keys_of({"text": ["A b.", "A  b."]}, 100).texts)) == 2


def test_pairs_that_share_a_prompt_are_different_rows_of_one_prompt() -> None:
    message = [{"role": "user", "content": "Hi"}]
    found = keys_of({"prompt": [message, message], "chosen": ["a", "b"], "rejected": ["c", "c"]}, 100)
    assert len(set(found.texts)) == 2
    assert len(set(found.prompts)) == 1


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}], "completion": "b"}])
def test_row_without_whole_text(row: dict[str, object]) -> None:
    with pytest.raises(
        InputError, match=r"'text', or 'prompt' and 'completion' as text; add one .the rows have prompt"
    ):
        text_of(row)
