"""Short stories that must use five given elements, written by a grammar, and the score of such a story.

The pair of a role and a thing is the composition that is held out for evaluation: the model knows baker and
key, and has to write about the two together for the first time.
"""

import random
import re
from collections.abc import Iterator
from math import prod

from tasks.reference import writing_tables as tables
from tasks.reference.problem import Problem, Split, split_of

ELEMENTS = ("who", "where", "thing", "feeling", "end")
MIN_SENTENCES, MAX_SENTENCES = 3, 8


def draw_elements(rng: random.Random) -> dict[str, str]:
    """A random value for each element, as it must occur in the story."""
    return {
        "who": f"a {rng.choice(tables.ROLES)}",
        "where": rng.choice(tables.PLACES),
        "thing": rng.choice(list(tables.THINGS)),
        "feeling": rng.choice(tables.FEELINGS),
        "end": rng.choice(tables.ENDS),
    }


def write(elements: dict[str, str], rng: random.Random) -> str:
    """One story with these elements: who, find, feeling and effect in either order, perhaps a friend, end."""
    name, friend = rng.sample(tables.HE + tables.SHE, 2)
    he, his = ("he", "his") if name in tables.HE else ("she", "her")
    thing = [rng.choice(tables.FEELS), rng.choice(tables.THINGS[elements["thing"]])]
    rng.shuffle(thing)
    if rng.random() < 0.3:
        closing = [rng.choice(tables.CLOSINGS_ALONE)]
    else:
        closing = [rng.choice(tables.FRIENDS), rng.choice(tables.CLOSINGS)]
    parts = [rng.choice(tables.OPENINGS), rng.choice(tables.FINDS), *thing, *closing, tables.FINISH]
    return " ".join(parts).format(N=name, F=friend, he=he, his=his, His=his.capitalize(), **elements)


def count_stories() -> int:
    """The number of stories of the grammar: the choices of elements, names, sentences and order.

    Where no sentence names the friend, the friend's name makes no other story.
    """
    names = len(tables.HE + tables.SHE)
    effects = sum(len(texts) for texts in tables.THINGS.values())
    elements = (tables.ROLES, tables.PLACES, tables.FEELINGS, tables.ENDS)
    sentences = (tables.OPENINGS, tables.FINDS, tables.FEELS)
    friends = len(tables.FRIENDS) * len(tables.CLOSINGS) * (names - 1)
    return (
        prod(len(choice) for choice in elements + sentences)
        * effects
        * 2  # the feeling comes before or after the effect
        * names
        * (friends + len(tables.CLOSINGS_ALONE))
    )


def draw(rng: random.Random) -> Problem:
    """One random problem of any split."""
    elements = draw_elements(rng)
    lines = [f"{key.capitalize()}: {elements[key]}" for key in ELEMENTS]
    return Problem(
        domain="writing",
        prompt="\n".join(["Write a short story.", *lines, "Story:"]),
        answer=f" {write(elements, rng)}\n",
        meta={"elements": elements},
    )


def composition_key(problem: Problem) -> str:
    """What is held out: the pair of the role (the last word of who) and the thing."""
    elements = problem.meta["elements"]
    return f"writing:{elements['who'].split()[-1]}|{elements['thing']}"


def problems(split: Split, seed: int = 0) -> Iterator[Problem]:
    """An endless, deterministic stream of the split's problems; only train may repeat a prompt."""
    rng = random.Random(f"{split}-{seed}-writing")
    seen: set[str] = set()
    while True:
        problem = draw(rng)
        if split_of(problem.prompt, composition_key(problem)) != split:
            continue
        if split != "train":
            if problem.id in seen:
                continue
            seen.add(problem.id)
        yield problem


def _sentences(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part.strip()]


def score(story: str, elements: dict[str, str]) -> dict[str, float | bool]:
    """The share of elements that occur in the story as whole words, and whether its form is right.

    The form: 3 to 8 different sentences, then "The end." and nothing after it.
    """
    told = story.lower()
    present = [bool(re.search(rf"\b{re.escape(text.lower())}\b", told)) for text in elements.values()]
    sentences = _sentences(story)
    body = sentences[:-1]
    form = (
        bool(sentences)
        and sentences[-1] == tables.FINISH
        and MIN_SENTENCES <= len(body) <= MAX_SENTENCES
        and len({sentence.lower() for sentence in sentences}) == len(sentences)
    )
    return {"elements": sum(present) / len(present) if present else 0.0, "form": form}


def distractors(problem: Problem, rng: random.Random, count: int = 3) -> list[str]:
    """Well-formed stories in which two or three of the prompt's elements were swapped for others."""
    elements: dict[str, str] = problem.meta["elements"]
    chosen: list[str] = []
    while len(chosen) < count:
        swapped = rng.sample(ELEMENTS, rng.choice((2, 3)))
        other = draw_elements(rng)
        story = f" {write({**elements, **{key: other[key] for key in swapped}}, rng)}\n"
        if all(other[key] != elements[key] for key in swapped) and story not in chosen:
            chosen.append(story)
    return chosen
