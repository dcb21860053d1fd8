"""A seeded grammar of film reviews, and a judge built from the same grammar.

The grammar is data: `_GRAMMAR` maps a symbol to its alternatives, and `{symbol}` inside an alternative stands
for any of that symbol's (`{Symbol}`: with a capital). `generate_reviews` draws from it; `judge_sentences`
matches regular expressions compiled from it. So the sentiment of a sentence is known, not estimated.

In a contrast the main clause wins: "The plot was weak, but the acting was superb." is positive.
"""

import random
import re
from collections.abc import Iterator
from functools import cache

_RULES = {
    # --- the opening: says nothing about what the writer thought of the film ---
    "opening": """
        I watched {title} with my {friend} {at_home} {recently}. |
        My {friend} and I saw {title} {out} {recently}. | {Recently} I saw {title} {out} with my {friend}. |
        {Recently} my {friend} and I watched {title} {at_home}. |
        My {friend} wanted to see {title}, so we went {recently}. | I went to see {title} {out} {recently}. |
        My {friend} put on {title} {at_home} {recently}. | We watched {title} {at_home} {recently}.
    """,
    "background": """
        It was directed by {john} {keller} and filmed in {lisbon}. | It was written by {john} {keller}. |
        The film follows a {young} {teacher} who {moves_to} {lisbon}. |
        {John} {keller} plays a {young} {teacher}. |
        It tells the story of a {young} {teacher} and a {teacher}. |
        It is set in {lisbon} and runs for {two} hours. |
        {John} {keller} directed it and also plays a {teacher}. | It is about a {teacher} from {lisbon}.
    """,
    "title": """
        The {Silent} {Harbour} | {Silent} {Harbour} | The {Harbour} of {lisbon} |
        The {Harbour} and the {Silver}
    """,
    "silent": """
        silent | winter | second | northern | hidden | crimson | paper | golden | seventh | midnight |
        electric | distant | wooden | summer | hollow | scarlet | ancient | final | velvet | iron | glass |
        blue | narrow | eastern
    """,
    "harbour": """
        harbour | river | garden | letter | station | mountain | witness | island | mirror | window | forest |
        bridge | lantern | orchard | tower | visitor | valley | market | portrait | compass | tunnel |
        meadow | road | clock
    """,
    "silver": "silver | fox | sparrow | ocean | moon | wolf | sea | crown | violin | desert | shadow | storm",
    "friend": """
        friend | brother | sister | mother | father | wife | husband | cousin | neighbour | uncle | aunt |
        daughter | son | roommate | grandmother | colleague
    """,
    "at_home": "on the sofa | at home | on the train | on my laptop | in the kitchen | on television",
    "out": "at the cinema | at a festival | at the local theatre | in {lisbon} | downtown",
    "recently": """
        on a {rainy} {tuesday} | last {tuesday} | one {rainy} evening | {two} weeks ago | {two} days ago |
        last {spring}
    """,
    "rainy": "rainy | cold | warm | windy | foggy | sunny | snowy | cloudy",
    "tuesday": "Monday | Tuesday | Wednesday | Thursday | Friday | Saturday | Sunday",
    "spring": "spring | summer | autumn | winter | week | month | weekend",
    "two": "two | three | four | five | six",
    "john": "John | Maria | Peter | Anna | David | Helen | Carlos | Ingrid | Tom | Sofia | Henry | Yuki",
    "keller": """
        Keller | Moreau | Baker | Rossi | Lindgren | Tanaka | Novak | Hughes | Silva | Brandt | Murphy |
        Okafor
    """,
    "lisbon": """
        Lisbon | Chicago | Paris | Norway | Berlin | Texas | Tokyo | Scotland | Rome | Canada | London |
        Vienna
    """,
    "young": "young | retired | former | famous | local | wealthy | foreign | travelling",
    "teacher": """
        teacher | sailor | doctor | baker | lawyer | soldier | singer | painter | detective | farmer | nurse |
        pilot | gardener | tailor | waiter | journalist
    """,
    "moves_to": "moves to | returns to | gets lost in | hides in | grows up in | travels to",
    # --- opinions: the two sentiments share their nouns, adverbs and negations ---
    "positive": """
        The {thing} was {praise}. | The {thing} was {praise}. | The {jokes} were {praise}. |
        The {jokes} were {praise}. | I found the {thing} {superb}. | I {loved} the {craft} and the {story}. |
        I {loved} the {jokes}. | The {story} was {superb}, and so was the {craft}. |
        Both the {craft} and the {story} were {superb}. |
        The {story} was {blame}, but the {craft} was {praise}. |
        The {craft} was {blame}, but the {story} was {praise}. |
        Although the {craft} was {blame}, the {story} was {praise}. |
        Although the {story} was {blame}, the {jokes} were {praise}. |
        The {hero} was {superb} in every scene. | The {hero} gave a {truly} {superb_a} performance. |
        The {thing} kept me {hooked}. | The {thing} worked {well}. | The {jokes} made me {smile}. |
        There was not a single {boring} scene. | There was never a {boring} moment. |
        I never {lost_interest}. | Nobody could call the {thing} {boring}. |
        I did not expect the {thing} to be so {good}. | I expected a {boring} film, but it was {praise}.
    """,
    "negative": """
        The {thing} was {blame}. | The {thing} was {blame}. | The {jokes} were {blame}. |
        The {jokes} were {blame}. | I found the {thing} {awful}. | I {hated} the {craft} and the {story}. |
        I {hated} the {jokes}. | The {story} was {awful}, and so was the {craft}. |
        Both the {craft} and the {story} were {awful}. |
        The {story} was {praise}, but the {craft} was {blame}. |
        The {craft} was {praise}, but the {story} was {blame}. |
        Although the {craft} was {praise}, the {story} was {blame}. |
        Although the {story} was {praise}, the {jokes} were {blame}. |
        The {hero} was {awful} in every scene. | The {hero} gave a {truly} {awful_a} performance. |
        The {thing} put me {to_sleep}. | The {thing} worked {badly}. | The {jokes} made me {cringe}. |
        There was not a single {good} scene. | There was never a {good} moment. | I soon {lost_interest}. |
        Nobody could call the {thing} {good}. | I did not expect the {thing} to be so {boring}. |
        I expected a {good} film, but it was {blame}.
    """,
    "positive_verdict": """
        I would gladly watch it again. | I recommend it to {everyone}. | Do not miss it! |
        In short, it was {praise}. | All in all, a {truly} {superb_a} film. |
        It was one of the best films of the year. | It was worth {my_time}. | Overall, I {loved} it. |
        What a {superb_a} film!
    """,
    "negative_verdict": """
        I would never watch it again. | I cannot recommend it to {everyone}. | Do not bother! |
        In short, it was {blame}. | All in all, a {truly} {awful_a} film. |
        It was one of the worst films of the year. | It was not worth {my_time}. | Overall, I {hated} it. |
        What a {awful_a} film!
    """,
    # --- below: what a language model writes and the grammar does not, contrasts of like things ---
    "positive_besides": """
        The {thing} was {any}, but the {thing} was {praise}. |
        Although the {thing} was {any}, the {thing} was {praise}. |
        Although the {thing} was {any}, the {jokes} were {praise}. | I expected a {any_film} film, but it was {praise}.
    """,
    "negative_besides": """
        The {thing} was {any}, but the {thing} was {blame}. |
        Although the {thing} was {any}, the {thing} was {blame}. |
        Although the {thing} was {any}, the {jokes} were {blame}. | I expected a {any_film} film, but it was {blame}.
    """,
    "any": "{praise} | {blame}",
    "any_film": "{good} | {boring}",
    "thing": "{story} | {craft}",
    "story": """
        plot | story | script | dialogue | ending | premise | mystery | romance | first half | final act
    """,
    "craft": """
        acting | music | camera work | editing | lighting | direction | cast | pacing | sound design | humour
    """,
    "jokes": "jokes | characters | songs | costumes | action scenes | special effects | twists | villains",
    "hero": "lead actor | lead actress | villain | child actor | hero | heroine | narrator",
    "praise": """
        {superb_a} | {superb_a} | {superb_a} | {superb} | {superb} | {superb} | {truly} {superb_a} |
        {truly} {superb_a} | never {boring} | not {boring} at all |
        anything but {boring} | far from {boring}
    """,
    "blame": """
        {awful_a} | {awful_a} | {awful_a} | {awful} | {awful} | {awful} | {truly} {awful_a} |
        {truly} {awful_a} | never {good} | not {good} at all | anything but {good} |
        far from {good}
    """,
    "superb": "{superb_a} | superb | excellent | impressive | outstanding | inventive | {very} {good}",
    "awful": "{awful_a} | awful | amateurish | annoying | unbearable | irritating | {very} {boring}",
    # these follow "a", so none begins with a vowel
    "superb_a": """
        wonderful | brilliant | charming | clever | memorable | masterful | refreshing | beautiful |
        delightful | remarkable | terrific | fantastic | marvellous | splendid
    """,
    "awful_a": """
        terrible | weak | clumsy | dreadful | tedious | forgettable | lifeless | sloppy | poor | bland |
        shallow | horrible | lazy | mediocre
    """,
    "good": "good | great | funny | convincing | satisfying | gripping | fresh | smart",
    "boring": "boring | dull | bad | predictable | silly | confusing | flat | slow",
    "very": "very | really | quite | so | surprisingly | consistently",
    "truly": "truly | simply | genuinely",
    "loved": "loved | enjoyed | adored | admired | really liked",
    "hated": "hated | disliked | despised | could not stand | did not like",
    "hooked": """
        hooked | guessing until the end | on the edge of my seat | smiling | interested from start to finish
    """,
    "to_sleep": "to sleep | in a bad mood | off within minutes | off from start to finish",
    "well": "well | perfectly | beautifully | better than I expected",
    "badly": "badly | worse than I expected | against the film",
    "smile": "smile | laugh out loud | cry with joy | forget the time",
    "cringe": "cringe | yawn | shake my head | look at my watch",
    "lost_interest": "lost interest | stopped caring | checked the time | wanted to leave",
    "everyone": "anyone | any of my friends | people who like films | families",
    "my_time": "my time | the money | the ticket | the wait",
}  # fmt: skip
_GRAMMAR = {symbol: [" ".join(option.split()) for option in rule.split("|")] for symbol, rule in _RULES.items()}
_SLOT = re.compile(r"\{(\w+)\}")
_SENTENCE = re.compile(r"[^.!?]*[.!?]+")
_KINDS = {
    "positive": ("positive", "positive_verdict", "positive_besides"),
    "negative": ("negative", "negative_verdict", "negative_besides"),
    "neutral": ("opening", "background"),
}


def _options(symbol: str) -> list[str]:
    """The alternatives of a symbol; of `Symbol`, with a capital (which a leading slot hands on)."""
    options = _GRAMMAR[symbol.lower()]
    if symbol[0].islower():
        return options
    return [re.sub(r"\w", lambda letter: letter[0].upper(), option, count=1) for option in options]


def _draw(symbol: str, rng: random.Random, used: set[str]) -> str:
    """Expand a symbol at random; within one review, no alternative comes twice while others are left."""
    options = _options(symbol)
    option = rng.choice([option for option in options if option.lower() not in used] or options)
    used.add(option.lower())
    return _SLOT.sub(lambda slot: _draw(slot[1], rng, used), option)


def _write_review(label: int, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """The opening of a review, and its opinion sentences, each with the sentiment that is meant."""
    used: set[str] = set()
    opening = f"{_draw('opening', rng, used)} {_draw('background', rng, used)}"
    own, other = ("positive", "negative") if label else ("negative", "positive")
    count = rng.choices((2, 3, 4), (3, 5, 2))[0]
    sentiments = [own] * count
    if count > 2 and rng.random() < 0.45:  # about one opinion in ten, and never half of them
        sentiments[rng.randrange(count)] = other
    opinions = [(_draw(sentiment, rng, used), sentiment) for sentiment in sentiments]
    if count < 4 and rng.random() < 0.6:
        opinions.append((_draw(f"{own}_verdict", rng, used), own))
    return opening, opinions


def generate_reviews(n: int, seed: int) -> list[tuple[str, int]]:
    """Write `n` reviews with labels 0 (negative) and 1 (positive) in turn; no two share an opening.

    A review opens with two neutral sentences; then come two to four opinions, about one in ten of them
    against the review's sentiment but never as many as for it, and often a verdict.

    Example:
        >>> (text, label), *_ = generate_reviews(2, seed=0)
        >>> label, text[:75]
        (0, 'My roommate put on The Seventh Valley on my laptop four weeks ago. It is ab')
        >>> judge_sentences(text)
        ['neutral', 'neutral', 'negative', 'positive', 'negative', 'negative']
    """
    rng = random.Random(seed)
    openings: set[str] = set()
    reviews: list[tuple[str, int]] = []
    while len(reviews) < n:
        label = len(reviews) % 2
        opening, opinions = _write_review(label, rng)
        if opening not in openings:
            openings.add(opening)
            reviews.append((" ".join([opening, *(sentence for sentence, _ in opinions)]), label))
    return reviews


def _pattern(symbol: str) -> str:
    """The regular expression of all that a symbol can become."""
    options = []
    for option in dict.fromkeys(_options(symbol)):
        literals_and_slots = enumerate(_SLOT.split(option))
        options.append("".join(_pattern(part) if i % 2 else re.escape(part) for i, part in literals_and_slots))
    return f"(?:{'|'.join(options)})"


@cache
def _judge() -> re.Pattern[str]:
    kinds = (f"(?P<{kind}>{'|'.join(map(_pattern, symbols))})" for kind, symbols in _KINDS.items())
    return re.compile("|".join(kinds))


def _judged(text: str, start: int = 0) -> Iterator[tuple[str, str]]:
    """Each complete sentence that ends after `start`, and what it is."""
    for found in _SENTENCE.finditer(text):
        if found.end() > start:
            sentence = " ".join(found[0].split())
            match = _judge().fullmatch(sentence)
            yield sentence, (match.lastgroup if match else None) or "unknown"


def judge_sentences(text: str) -> list[str]:
    """Call each complete sentence "positive", "negative", "neutral" or, outside the grammar, "unknown".

    A last sentence that was cut off is not counted.

    Example:
        >>> judge_sentences("It was written by Anna Novak. The plot was weak, but the cast was never dull. I")
        ['neutral', 'positive']
        >>> judge_sentences("The acting was far from good. Superb superb superb.")
        ['negative', 'unknown']
    """
    return [kind for _, kind in _judged(text)]


def grammar_positive(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Reward 1 for more positive sentences than negative and unknown ones together, else 0.

    Sentences that end in the completion are judged, one begun in the prompt included. An opinion said
    again in the same words counts as unknown.

    Example:
        >>> prompts = ["It is about a nurse from Rome."] * 3
        >>> grammar_positive(prompts, [" Do not miss it!", " Do not bother!", " Do not miss it!" * 2])
        [1.0, 0.0, 0.0]
    """
    return [float(_is_positive(prompt, text)) for prompt, text in zip(prompts, completions, strict=True)]


def _is_positive(prompt: str, completion: str) -> bool:
    seen: set[str] = set()
    balance = 0
    for sentence, kind in _judged(prompt + completion, len(prompt)):
        if kind != "neutral":
            balance += 1 if kind == "positive" and sentence not in seen else -1
            seen.add(sentence)
    return balance > 0


def grammar_valid(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Reward the share of complete sentences that the grammar could have written: 1 if there are none.

    Example:
        >>> grammar_valid(["It is about a nurse "], ["from Rome. The plot were good."])
        [0.5]
    """
    return [_share_valid(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def _share_valid(prompt: str, completion: str) -> float:
    kinds = [kind for _, kind in _judged(prompt + completion, len(prompt))]
    return sum(kind != "unknown" for kind in kinds) / len(kinds) if kinds else 1.0
