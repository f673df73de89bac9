"""Names, nouns, step rules and sentence templates of the word problems in ``math.py``.

Templates: ``{S}`` is the subject (name or pronoun), ``{T}`` always its name, ``{o}`` another person, ``{n}``
the step's number; ``[buys|buy]`` is the verb for one person or for two.
"""

from dataclasses import dataclass

HE = ("Tom", "Sam", "Ben", "Max", "Leo", "Jack", "Paul", "Omar", "Finn", "Hugo")
SHE = ("Ann", "Mia", "Eva", "Zoe", "Lily", "Rosa", "Nina", "Emma", "Kate", "Ruth")
NOUNS = (
    "apples",
    "pears",
    "books",
    "pens",
    "cards",
    "shells",
    "stamps",
    "eggs",
    "cakes",
    "toys",
    "balls",
    "stones",
    "cups",
    "plums",
    "nuts",
    "flowers",
)
BOXES = ("bag", "box", "jar", "basket")
BOX_PLURALS = {"bag": "bags", "box": "boxes", "jar": "jars", "basket": "baskets"}
GOODS = ("hat", "book", "lamp", "ball", "cup")
TIMES = {2: "twice", 3: "3 times", 4: "4 times", 5: "5 times"}

ITEMS, DOLLARS, COST = "items", "dollars", "cost"  # what the running value counts; COST is a bill to be paid
SMALL = tuple(range(2, 13))


@dataclass(frozen=True)
class Step:
    """One equation: the running value, an operator and one of ``numbers`` (in front where ``flipped``)."""

    op: str
    numbers: tuple[int, ...]
    modes: tuple[str, ...] = (ITEMS, DOLLARS, COST)
    subject: str = "same"  # who holds the new value: "same", "other" or "both"
    to_mode: str | None = None
    flipped: bool = False
    last: bool = False  # asks a question of its own, so nothing can follow


@dataclass(frozen=True)
class Start:
    """A first equation between two numbers of the text."""

    op: str
    left: tuple[int, ...]
    right: tuple[int, ...]
    mode: str


FACTORS = tuple(range(2, 10))
STARTS: dict[str, Start] = {
    "groups": Start("*", FACTORS, FACTORS, ITEMS),
    "rate": Start("*", FACTORS, FACTORS, ITEMS),
    "wage": Start("*", FACTORS, FACTORS, DOLLARS),
    "cost": Start("*", FACTORS, FACTORS, COST),
    "colours": Start("+", tuple(range(2, 21)), tuple(range(2, 21)), ITEMS),
    "share": Start("/", tuple(range(6, 61)), (3, 4, 5, 6), ITEMS),
}

STEPS: dict[str, Step] = {
    "gain": Step("+", SMALL),
    "lose": Step("-", SMALL),
    "double": Step("*", (2,)),
    "half": Step("/", (2,)),
    "split": Step("/", (3, 4, 5, 6)),
    "more": Step("+", SMALL, subject="other"),
    "fewer": Step("-", SMALL, subject="other"),
    "times": Step("*", tuple(TIMES), subject="other"),
    "total": Step("+", SMALL, subject="both"),
    "price": Step("*", FACTORS, (ITEMS,), to_mode=DOLLARS),
    "trade": Step("*", (2, 3, 4, 5), (ITEMS,), to_mode=ITEMS),
    "buy": Step("/", FACTORS, (DOLLARS,), to_mode=ITEMS),
    "change": Step("-", (10, 20, 50), (COST,), to_mode=DOLLARS, flipped=True),
    "compare": Step("-", SMALL, last=True),
    "goal": Step("-", tuple(range(10, 100, 10)), (ITEMS, DOLLARS), flipped=True, last=True),
    "pack": Step("/", FACTORS, (ITEMS,), last=True),
}

PLAIN = {
    ITEMS: ("{T} has {n} {items}.", "{T} owns {n} {items}."),
    DOLLARS: ("{T} has {n} dollars.", "{T} has saved {n} dollars."),
    COST: ("{T} buys a {good} for {n} dollars.", "{T} wants a {good} that costs {n} dollars."),
}
START_TEXTS = {
    "groups": (
        "{T} has {a} {boxes} with {b} {items} in each.",
        "{T} has {a} {boxes}. Each {box} holds {b} {items}.",
    ),
    "rate": ("{T} finds {a} {items} a day for {b} days.", "{T} gets {a} {items} each day for {b} days."),
    "wage": (
        "{T} earns {a} dollars an hour and works {b} hours.",
        "{T} is paid {a} dollars a day for {b} days.",
    ),
    "cost": (
        "{T} buys {a} {items} for {b} dollars each.",
        "{T} buys {a} {items}. Each one costs {b} dollars.",
    ),
    "colours": (
        "{T} has {a} red {items} and {b} blue {items}.",
        "{T} has {a} old {items} and {b} new {items}.",
    ),
    "share": (
        "{T} gets an equal share of {a} {items} for {b} children.",
        "{a} {items} are shared equally by {b} children. {T} is one of them.",
    ),
}
STEP_TEXTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("gain", ITEMS): (
        "{S} [buys|buy] {n} more {items}.",
        "{S} [finds|find] {n} more {items}.",
        "{S} [gets|get] {n} more {items} from {o}.",
    ),
    ("gain", DOLLARS): (
        "{S} [earns|earn] {n} more dollars.",
        "{S} [finds|find] {n} more dollars.",
        "{S} [gets|get] {n} more dollars from {o}.",
    ),
    ("gain", COST): (
        "{S} also [buys|buy] a {good} for {n} dollars.",
        "{S} also [pays|pay] {n} dollars for a {good}.",
    ),
    ("lose", ITEMS): (
        "{S} [gives|give] {n} {items} to {o}.",
        "{S} [loses|lose] {n} {items}.",
        "{S} [sells|sell] {n} {items}.",
    ),
    ("lose", DOLLARS): (
        "{S} [gives|give] {n} dollars to {o}.",
        "{S} [loses|lose] {n} dollars.",
        "{S} [spends|spend] {n} dollars on a {good}.",
    ),
    ("lose", COST): (
        "{S} [gets|get] {n} dollars off the price.",
        "The shop takes {n} dollars off the price.",
    ),
    ("double", ITEMS): (
        "{S} [doubles|double] the number of {items}.",
        "{S} [gets|get] just as many {items} again.",
    ),
    ("double", DOLLARS): ("{S} [doubles|double] the money.", "{S} [gets|get] just as many dollars again."),
    ("double", COST): ("{S} [buys|buy] the same again.", "The price doubles."),
    ("half", ITEMS): (
        "{S} [gives|give] half of the {items} to {o}.",
        "{S} [loses|lose] half of the {items}.",
    ),
    ("half", DOLLARS): (
        "{S} [gives|give] half of the dollars to {o}.",
        "{S} [spends|spend] half of the dollars.",
    ),
    ("half", COST): ("The shop takes off half of the price.", "{S} only [pays|pay] half of the price."),
    ("split", ITEMS): (
        "{S} [puts|put] the {items} in {n} equal piles and [keeps|keep] one pile.",
        "{S} [splits|split] the {items} into {n} equal parts and [keeps|keep] one part.",
    ),
    ("split", DOLLARS): (
        "{S} [puts|put] the dollars in {n} equal piles and [keeps|keep] one pile.",
        "{S} [splits|split] the dollars into {n} equal parts and [keeps|keep] one part.",
    ),
    ("split", COST): (
        "{n} people, {T} among them, split the price into equal parts.",
        "{T} is one of {n} people who split the price into equal parts.",
    ),
    ("more", ITEMS): ("{o} has {n} more {items} than {T}.", "{o} has {n} {items} more than {T}."),
    ("more", DOLLARS): ("{o} has {n} more dollars than {T}.", "{o} has {n} dollars more than {T}."),
    ("more", COST): ("{o} pays {n} more dollars than {T}.", "{o} pays {n} dollars more than {T}."),
    ("fewer", ITEMS): ("{o} has {n} fewer {items} than {T}.", "{o} has {n} {items} less than {T}."),
    ("fewer", DOLLARS): ("{o} has {n} fewer dollars than {T}.", "{o} has {n} dollars less than {T}."),
    ("fewer", COST): ("{o} pays {n} fewer dollars than {T}.", "{o} pays {n} dollars less than {T}."),
    ("times", ITEMS): ("{o} has {times} as many {items} as {T}.", "{o} owns {times} as many {items} as {T}."),
    ("times", DOLLARS): ("{o} has {times} as many dollars as {T}.", "{o} has {times} as much money as {T}."),
    ("times", COST): ("{o} pays {times} as many dollars as {T}.", "{o} pays {times} as much as {T}."),
    ("total", ITEMS): (
        "{o} has {n} {items}. {T} and {o} put their {items} together.",
        "{T} and {o}, who has {n} {items}, put their {items} together.",
    ),
    ("total", DOLLARS): (
        "{o} has {n} dollars. {T} and {o} put their dollars together.",
        "{T} and {o}, who has {n} dollars, put their dollars together.",
    ),
    ("total", COST): (
        "{o} has to pay {n} dollars. {T} and {o} pay together.",
        "{T} and {o}, who has to pay {n} dollars, pay together.",
    ),
    ("price", ITEMS): (
        "{S} [sells|sell] all the {items} for {n} dollars each.",
        "{S} [gets|get] {n} dollars for each of the {items}.",
    ),
    ("trade", ITEMS): (
        "{S} [swaps|swap] each of the {items} for {n} {new}.",
        "{S} [gets|get] {n} {new} for each of the {items}.",
    ),
    ("buy", DOLLARS): (
        "{S} [spends|spend] all the dollars on {new} for {n} dollars each.",
        "{S} [buys|buy] {new} with all the dollars. Each one costs {n} dollars.",
    ),
    ("change", COST): (
        "{S} [pays|pay] with a note of {n} dollars and [keeps|keep] the change.",
        "{S} [gets|get] the change from a note of {n} dollars.",
    ),
    ("compare", ITEMS): ("{o} has {n} {items}.", "{o} owns {n} {items}."),
    ("compare", DOLLARS): ("{o} has {n} dollars.", "{o} has saved {n} dollars."),
    ("compare", COST): ("{o} pays {n} dollars.", "{o} has to pay {n} dollars."),
    ("goal", ITEMS): ("{S} [needs|need] {n} {items}.", "{S} [wants|want] to have {n} {items}."),
    ("goal", DOLLARS): ("{S} [needs|need] {n} dollars.", "{S} [wants|want] to have {n} dollars."),
    ("pack", ITEMS): (
        "{S} [puts|put] the {items} in {boxes} of {n}.",
        "{S} [puts|put] {n} {items} in each {box}.",
    ),
}
QUESTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("", ITEMS): ("How many {items} [does|do] {T} have?", "How many {items} [does|do] {T} have now?"),
    ("", DOLLARS): ("How many dollars [does|do] {T} have?", "How many dollars [does|do] {T} have now?"),
    ("", COST): ("How many dollars [does|do] {T} pay?", "How many dollars [does|do] {T} have to pay?"),
    ("compare", ITEMS): ("How many more {items} [does|do] {T} have than {o}?",),
    ("compare", DOLLARS): ("How many more dollars [does|do] {T} have than {o}?",),
    ("compare", COST): ("How many more dollars [does|do] {T} pay than {o}?",),
    ("goal", ITEMS): ("How many more {items} [does|do] {T} need?",),
    ("goal", DOLLARS): ("How many more dollars [does|do] {T} need?",),
    ("pack", ITEMS): ("How many {boxes} [does|do] {T} fill?",),
}
