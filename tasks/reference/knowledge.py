"""Facts of an invented world: passages that state them and questions that ask for them.

Every fact is stated in passages of the training split. What the evaluation holds out is the way of asking:
one phrasing of the question about one fact, or one two-step path ("the trade of the town where Orin lives")
from one entity. A model answers those only if it stored the facts and not the question texts.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from tasks.reference.problem import Problem, Split, split_of

DOMAIN = "knowledge"
WORLD_SEED = "winnow-world-1"
# A larger share than the other domains hold out: the world is finite, and at 10 % there would be too few
# questions to tell two models apart. The passages still state every fact.
HELD_OUT = 0.2
PASSAGE_SHARE = 0.6
TWO_STEP_SHARE = 0.1

GOODS = (
    "salt wool iron glass honey silk copper timber wine leather pearls amber wax linen pepper oil paper tea coal rope"
).split()
COLOURS = "red blue green white black yellow purple orange brown grey pink silver".split()
REGIONS = "hills coast marsh forest desert valley plain moor islands canyon steppe delta".split()
FESTIVALS = "lanterns kites masks bells boats mirrors drums ribbons torches puppets flowers candles".split()
JOBS = (
    "baker smith weaver farmer sailor painter doctor teacher miner hunter singer potter carpenter "
    "tailor judge cook guard scribe brewer fisher"
).split()
PETS = "cat dog fox parrot rabbit goat hawk turtle ferret pony lizard mouse duck raven hedgehog toad".split()
FOODS = (
    "bread cheese soup rice plums fish beans apples cake nuts mushrooms porridge grapes onions eggs "
    "figs noodles pancakes pears carrots"
).split()
DIETS = (
    "moss berries snails roots clams beetles grass acorns worms bark seeds frogs leaves crabs ants thistles"
).split()
CRIES = "howl hiss growl whistle roar click croak hum squeal bark purr rattle".split()
FISH = ("trout pike eel salmon carp perch bream sturgeon catfish minnow tench roach barbel loach chub dace").split()
CRAFTS = (
    "bridges clocks maps locks swords ships carpets lamps barrels harps gloves saddles statues wheels soap fireworks"
).split()
SYMBOLS = (
    "key crown hammer star anchor wolf tower wheel rose arrow bell lion shield moon feather leaf harp ladder bee spoon"
).split()

KIND_COUNTS = {"town": 30, "person": 70, "beast": 40, "river": 24, "guild": 36}
# The ending tells the kind of an entity; the two syllables before it belong to that entity alone.
ENDINGS = {
    "town": ("mora", "dun", "keth", "vask"),
    "person": ("lin", "rek", "sha", "nu"),
    "beast": ("gok", "rax", "zill", "hoob"),
    "river": ("wen", "ssa", "thir"),
    "guild": ("mund", "skar", "tolm"),
}


@dataclass(frozen=True)
class Relation:
    """What can be said of and asked about one property of a kind of entity."""

    name: str
    pool: Sequence[str]
    questions: tuple[str, str, str]
    statements: tuple[str, ...]


def _names() -> dict[str, list[str]]:
    rng = random.Random(f"{WORLD_SEED}-names")
    firsts = [c + v for c in ("b", "d", "f", "gr", "k", "l", "m", "n", "p", "s", "t", "v", "z") for v in "aeiou"]
    seconds = [c + v for c in ("b", "d", "k", "l", "m", "n", "r", "v") for v in "aeiou"]
    stems = [first + second for first in firsts for second in seconds]
    rng.shuffle(stems)
    return {
        kind: [(stems.pop() + rng.choice(ENDINGS[kind])).capitalize() for _ in range(count)]
        for kind, count in KIND_COUNTS.items()
    }


NAMES = _names()
KIND_OF = {name: kind for kind, names in NAMES.items() for name in names}

RELATIONS: dict[str, tuple[Relation, ...]] = {
    "town": (
        Relation(
            "river",
            NAMES["river"],
            ("What is the river of {e}?", "Which river flows through {e}?", "On which river does {e} lie?"),
            ("{e} lies on the river {v}.", "The river {v} flows through {e}.", "The river of {e} is {v}."),
        ),
        Relation(
            "trade",
            GOODS,
            ("What is the trade of {e}?", "Which good does {e} sell?", "What do merchants buy in {e}?"),
            ("The trade of {e} is {v}.", "{e} sells {v}.", "Merchants buy {v} in {e}."),
        ),
        Relation(
            "banner",
            COLOURS,
            (
                "What is the banner colour of {e}?",
                "Which colour is the banner of {e}?",
                "What colour flies over {e}?",
            ),
            ("The banner of {e} is {v}.", "{e} has a banner of {v}.", "The colour over {e} is {v}."),
        ),
        Relation(
            "region",
            REGIONS,
            ("What is the region of {e}?", "In which region is {e}?", "Which land surrounds {e}?"),
            ("{e} is in the {v}.", "The region of {e} is the {v}.", "The {v} surrounds {e}."),
        ),
        Relation(
            "festival",
            FESTIVALS,
            (
                "What is the festival of {e}?",
                "Which festival is held in {e}?",
                "What do people celebrate in {e}?",
            ),
            (
                "The festival of {e} is that of {v}.",
                "{e} holds the festival of {v}.",
                "People celebrate {v} in {e}.",
            ),
        ),
    ),
    "person": (
        Relation(
            "job",
            JOBS,
            ("What is the job of {e}?", "Which work does {e} do?", "As what does {e} work?"),
            ("The job of {e} is {v}.", "{e} works as a {v}.", "{e} became a {v}."),
        ),
        Relation(
            "home",
            NAMES["town"],
            ("What is the home town of {e}?", "In which town does {e} live?", "Where is the house of {e}?"),
            ("{e} lives in {v}.", "The home town of {e} is {v}.", "The house of {e} is in {v}."),
        ),
        Relation(
            "pet",
            PETS,
            ("What is the pet of {e}?", "Which animal does {e} keep?", "What animal lives with {e}?"),
            ("The pet of {e} is a {v}.", "{e} keeps a {v}.", "A {v} lives with {e}."),
        ),
        Relation(
            "food",
            FOODS,
            (
                "What is the favourite food of {e}?",
                "Which food does {e} like best?",
                "What does {e} love to eat?",
            ),
            ("The favourite food of {e} is {v}.", "{e} likes {v} best.", "{e} loves to eat {v}."),
        ),
    ),
    "beast": (
        Relation(
            "habitat",
            REGIONS,
            (
                "What is the habitat of the {e}?",
                "In which land does the {e} live?",
                "Where is the {e} found?",
            ),
            (
                "The {e} lives in the {v}.",
                "The habitat of the {e} is the {v}.",
                "The {e} is found in the {v}.",
            ),
        ),
        Relation(
            "diet",
            DIETS,
            ("What is the diet of the {e}?", "Which food does the {e} eat?", "What does the {e} feed on?"),
            ("The {e} eats {v}.", "The diet of the {e} is {v}.", "The {e} feeds on {v}."),
        ),
        Relation(
            "skin",
            COLOURS,
            (
                "What is the skin colour of the {e}?",
                "Which colour is the {e}?",
                "What colour does the {e} have?",
            ),
            ("The {e} is {v}.", "The skin of the {e} is {v}.", "The {e} has a colour of {v}."),
        ),
        Relation(
            "cry",
            CRIES,
            (
                "What is the cry of the {e}?",
                "Which sound does the {e} make?",
                "What do hunters hear from the {e}?",
            ),
            ("The cry of the {e} is a {v}.", "The {e} makes a {v}.", "Hunters hear a {v} from the {e}."),
        ),
    ),
    "river": (
        Relation(
            "source",
            REGIONS,
            ("What is the source of {e}?", "In which land does {e} rise?", "Where does {e} begin?"),
            ("{e} rises in the {v}.", "The source of {e} is in the {v}.", "{e} begins in the {v}."),
        ),
        Relation(
            "fish",
            FISH,
            ("What is the fish of {e}?", "Which fish swims in {e}?", "What do people catch in {e}?"),
            ("The fish of {e} is {v}.", "Many {v} swim in {e}.", "People catch {v} in {e}."),
        ),
        Relation(
            "water",
            COLOURS,
            (
                "What is the water colour of {e}?",
                "Which colour is the water of {e}?",
                "What colour does {e} look?",
            ),
            ("The water of {e} is {v}.", "{e} looks {v}.", "{e} carries {v} water."),
        ),
    ),
    "guild": (
        Relation(
            "seat",
            NAMES["town"],
            ("What is the seat of guild {e}?", "In which town is guild {e}?", "Where does guild {e} meet?"),
            ("The seat of guild {e} is {v}.", "Guild {e} meets in {v}.", "Guild {e} is in {v}."),
        ),
        Relation(
            "craft",
            CRAFTS,
            (
                "What is the craft of guild {e}?",
                "Which things does guild {e} make?",
                "What does guild {e} build?",
            ),
            ("Guild {e} makes {v}.", "The craft of guild {e} is {v}.", "Guild {e} builds {v}."),
        ),
        Relation(
            "symbol",
            SYMBOLS,
            (
                "What is the symbol of guild {e}?",
                "Which sign does guild {e} use?",
                "What is on the door of guild {e}?",
            ),
            (
                "The symbol of guild {e} is the {v}.",
                "Guild {e} uses the sign of the {v}.",
                "The {v} is on the door of guild {e}.",
            ),
        ),
        Relation(
            "dress",
            COLOURS,
            (
                "What is the dress colour of guild {e}?",
                "Which colour does guild {e} wear?",
                "What colour are the coats of guild {e}?",
            ),
            ("The dress of guild {e} is {v}.", "Guild {e} wears {v}.", "The coats of guild {e} are {v}."),
        ),
    ),
}

# First steps of two-step questions: (kind asked about, relation) and two ways to name the entity reached.
STEPS: dict[tuple[str, str], tuple[str, str]] = {
    ("person", "home"): ("the town where {e} lives", "the home town of {e}"),
    ("guild", "seat"): ("the town where guild {e} meets", "the seat of guild {e}"),
    ("town", "river"): ("the river that flows through {e}", "the river of {e}"),
}


def _facts() -> dict[tuple[str, str], str]:
    rng = random.Random(f"{WORLD_SEED}-facts")
    return {
        (entity, relation.name): rng.choice(relation.pool)
        for kind, names in NAMES.items()
        for entity in names
        for relation in RELATIONS[kind]
    }


FACTS = _facts()


def _question(entity: str, path: str, value: str, relation: Relation, asked: str, phrasing: int) -> Problem:
    return Problem(
        DOMAIN,
        f"Question: {asked}\nAnswer:",
        f" {value}\n",
        {
            "kind": "question",
            "entity": entity,
            "relation": path,
            "phrasing": phrasing,
            "steps": path.count(">") + 1,
            "value": value,
            "choices_pool": list(relation.pool),
        },
    )


def one_step_questions() -> Iterator[tuple[Problem, str]]:
    """Every question about one fact, with its composition key."""
    for entity, kind in KIND_OF.items():
        for relation in RELATIONS[kind]:
            value = FACTS[entity, relation.name]
            for i, template in enumerate(relation.questions):
                problem = _question(entity, relation.name, value, relation, template.format(e=entity), i)
                yield problem, f"knowledge:{entity}|{relation.name}|{i}"


def two_step_questions() -> Iterator[tuple[Problem, str]]:
    """Every question that goes through a second entity, with the composition key its phrasings share."""
    for (kind, step), descriptions in STEPS.items():
        for entity in NAMES[kind]:
            middle = FACTS[entity, step]
            for relation in RELATIONS[KIND_OF[middle]]:
                path = f"{step}>{relation.name}"
                value = FACTS[middle, relation.name]
                for i, description in enumerate(descriptions):
                    asked = relation.questions[i].format(e=description.format(e=entity))
                    yield _question(entity, path, value, relation, asked, i), f"knowledge:{entity}|{path}"


@cache
def question_pool(steps: int, split: Split) -> tuple[Problem, ...]:
    """All the questions of ``split`` that take one step or two, in a fixed order."""
    source = one_step_questions() if steps == 1 else two_step_questions()
    return tuple(problem for problem, key in source if split_of(problem.prompt, key, HELD_OUT) == split)


def passage(rng: random.Random) -> Problem:
    """Three to five facts about one random entity; the title names them, in the order of the sentences."""
    entity = rng.choice(list(KIND_OF))
    relations = RELATIONS[KIND_OF[entity]]
    told = rng.sample(relations, rng.randint(3, len(relations)))
    sentences = [rng.choice(r.statements).format(e=entity, v=FACTS[entity, r.name]) for r in told]
    return Problem(
        DOMAIN,
        f"About {entity} ({', '.join(r.name for r in told)}):",
        f" {' '.join(sentences)}\n",
        {"kind": "passage", "entity": entity, "relations": [r.name for r in told]},
    )


def _rounds(pool: Sequence[Problem], rng: random.Random) -> Iterator[Problem]:
    """``pool`` over and over, each round in a new order, so that nothing repeats before all was seen."""
    while True:
        yield from rng.sample(pool, len(pool))


def problems(split: Split, seed: int = 0) -> Iterator[Problem]:
    """Passages and questions for training and calibration, questions alone for evaluation; endless."""
    rng = random.Random(f"{split}-{seed}-{DOMAIN}")
    one_step = _rounds(question_pool(1, split), rng)
    two_step = _rounds(question_pool(2, split), rng)
    while True:
        if split != "evaluation" and rng.random() < PASSAGE_SHARE:
            candidate = passage(rng)
            # Passages have no part in evaluation: all are divided between training and calibration.
            while split_of(candidate.prompt, held_out=0.0) != split:
                candidate = passage(rng)
            yield candidate
        else:
            yield next(two_step if rng.random() < TWO_STEP_SHARE else one_step)


def distractors(problem: Problem, rng: random.Random, count: int = 3) -> list[str]:
    """Wrong answers to a question: other values of the same relation."""
    wrong = [value for value in problem.meta["choices_pool"] if value != problem.meta["value"]]
    return [f" {value}\n" for value in rng.sample(wrong, count)]
