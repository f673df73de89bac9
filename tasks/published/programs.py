"""The programs in answers, taken out in the sandbox: a text may keep Python's parser busy, or end its process."""

from collections.abc import Sequence
from pathlib import Path

from tasks.sandbox.run import Limits, Outcome, Program, judge_many

SOURCE = Path(__file__).with_name("program_text.py").read_text(encoding="utf-8")
LIMITS = Limits(cpu_seconds=5, wall_seconds=20.0, memory_bytes=2**30)
LONGEST = 200_000  # characters: no budget of tokens lets a program be as long


def programs(
    answers: Sequence[str],
    begun: Sequence[str],
    contexts: Sequence[str],
    names: Sequence[Sequence[str]],
    progress: str = "",
) -> list[str]:
    """The program in each answer (``program_text.take_out`` says what the arguments are and how it is found).

    An answer that is too long, or in which none is found in time, is given back as it stands with what had begun it.
    Raises WinnowError where the sandbox does not work.
    """
    asked = [
        Program(SOURCE, "take_out", [[answer[:LONGEST], before, context, list(wanted)]])
        for answer, before, context, wanted in zip(answers, begun, contexts, names, strict=True)
    ]

    def taken(place: int, outcome: Outcome) -> str:
        found = outcome.outputs[0] if outcome.status == "ok" else None
        return found if isinstance(found, str) else begun[place] + answers[place]

    return judge_many(asked, taken, LIMITS, progress)
