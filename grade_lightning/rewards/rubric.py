"""What a judge is asked about a completion, and what counts as its answer."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError

from .conversations import rendered

PROMPT, COMPLETION = "{prompt}", "{completion}"
RUBRIC = (
    "Prompt:\n{prompt}\n\nResponse:\n{completion}\n\n"
    "Is the response correct, helpful and honest? Answer with yes or no.\nAnswer:"
)
_STAND_IN = "Fine thanks"


@dataclass(frozen=True)
class Rubric:
    """A question about a prompt and its completion.

    Args:
        text: with `{completion}` once and, before it, perhaps `{prompt}`; other braces are text.

    Raises:
        InputError: the places are missing, or in another order.

    Example:
        >>> Rubric("{prompt} => {completion}. Good?").ask("2 + 2", "4")
        '2 + 2 => 4. Good?'
    """

    text: str

    def __post_init__(self) -> None:
        """Check the places."""
        before, _, after = self.text.partition(COMPLETION)
        if self.text.count(COMPLETION) != 1 or before.count(PROMPT) > 1 or PROMPT in after:
            raise InputError(
                f"rubric {self.text!r:.60}: must have {COMPLETION} once, and {PROMPT} at most once and before it"
            )

    def around(self, prompt: str, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[str, str]:
        """What is before the completion, and what is after it.

        Args:
            prompt: its text.
            tokenizer: by whose chat template, if it has one, the question is written as a user's.

        Raises:
            InputError: the template does not take the question, or leaves it out.
        """
        before, _, after = self.text.partition(COMPLETION)
        before = before.replace(PROMPT, prompt)
        if tokenizer is None or not tokenizer.chat_template:
            return before, after
        question = [{"role": "user", "content": before + _STAND_IN + after}]
        # a model that thinks first would not answer at once
        text = rendered(tokenizer, question, add_generation_prompt=True, enable_thinking=False)
        front, found, back = text.rpartition(_STAND_IN)
        if not found:
            raise InputError(
                f"reward {tokenizer.name_or_path}: its chat template leaves out what the user says; fix it, or remove "
                "it from the folder to have plain text judged"
            )
        return front, back

    def ask(self, prompt: str, completion: str) -> str:
        """The whole question."""
        before, after = self.around(prompt)
        return before + completion + after


def answer_ids(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    """Tokens that say a word at once: in small letters or with a capital, with a space before it or not.

    Raises:
        InputError: there is none.
    """
    found = set()
    for form in {word, word.capitalize()}:
        for text in (form, f" {form}"):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) == 1 and str(tokenizer.decode(ids)).strip() == form:
                found.add(ids[0])
    if not found:
        raise InputError(f"reward {tokenizer.name_or_path}: no token of it says {word!r}; choose another word")
    return sorted(found)
