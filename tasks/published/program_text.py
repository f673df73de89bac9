"""The program in what a model wrote: the text of this file is a program of its own in the sandbox.

A text is read as runs of lines that parse, wherever they stand: in fences of any kind or none, between prose, behind a
prompt that the answer goes on with. Of their statements those are kept that the tested function needs: definitions,
imports, assignments, and what fills a table that one of these has made. So calls, own tests, ``input()`` and
``sys.exit()`` fall away, and a docstring may hold a fence. It uses the standard library alone.

Of several definitions of a name the last counts that is whole, has a body and, where another has, a ``return``; for an
answer that goes on with a prompt the first, since what follows is no longer asked for.
"""

import ast
import re
import symtable
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PARSED = 2_000_000  # characters handed to the parser in all: of an answer that nothing parses in, the rest is prose
CONTEXT = -1  # the number of the run that is the prompt's
FENCE = re.compile(r"(?P<indent>[ \t]*)(?:```+|~~~+)[^`]*")
# How a statement at the margin may begin; of prose the most does not.
BEGINS = re.compile(
    r"""@|\#|[rRbBfFuU]{0,2}(?:\"|')|[(\[{*]
    |(?:import|from|def|class|async|if|for|while|try|with|del|assert|raise|return|match|type|global|pass|lambda)\b
    |[^\W\d]\w*\s*(?:=|:|\(|\.|\[|,|[-+*/%&|^@<>]{1,2}=)""",
    re.VERBOSE,
)
SETS_LIMITS = {"setrecursionlimit", "set_int_max_str_digits"}
ANY_NAME = {"globals", "locals", "vars", "eval", "exec"}  # whoever calls these may use a name without saying it
DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(eq=False)
class Statement:
    """A statement at the margin: what it binds, uses and changes.

    ``run`` and ``place``: where it stands; ``before``: the empty lines and comments above it; ``ends``: its last line
    in the text; ``whole``: it does not end where parsing failed.
    """

    run: int
    place: int
    before: str
    source: str
    ends: int
    node: ast.stmt
    whole: bool = True
    binds: set[str] = field(default_factory=set)
    uses: set[str] = field(default_factory=set)
    changes: set[str] = field(default_factory=set)

    @property
    def defines(self) -> bool:
        return isinstance(self.node, DEFINITION)

    @property
    def imports(self) -> bool:
        return isinstance(self.node, (ast.Import, ast.ImportFrom))


def take_out(answer: str, begun: str, context: str, names: list[str]) -> str:
    """The program in ``answer``, which goes on with ``begun``; all of both where none defines ``names[0]``.

    ``context``: a prompt that the answer does not repeat, for imports and helpers that it leaves out. ``names``: what
    must be there, the function that is tested first.
    """
    warnings.simplefilter("ignore")
    answer = answer.replace("\r\n", "\n").replace("\0", "").replace("\ufeff", "")
    left = [PARSED]
    given = runs(context, left, numbered_from=CONTEXT)
    for text in dict.fromkeys(readings(answer, begun, context)):
        statements = [*given, *runs(text, left)]
        if any(names[0] in one.binds and not is_stub(one) for one in statements):
            kept = {one for one in statements if one.run >= 0 and one.ends <= begun.count("\n")}
            return program_of(statements, kept, names, first=bool(begun))
    return begun + answer


def readings(answer: str, begun: str, context: str) -> Iterator[str]:
    """Ways to read an answer, the plainest first."""
    yield begun + answer
    answer = answer.expandtabs(4)
    yield begun + answer
    yield begun + unindented(answer)
    for body in (inside_of_fence(answer), answer):
        for prompt in filter(None, (begun, context)):
            yield prompt.rstrip("\n") + "\n" + body.lstrip("\n")
            yield prompt.rstrip("\n") + "\n" + first_line_indented(body)


def unindented(text: str) -> str:
    """Code that stands deeper as a whole, such as a block in a list, at the margin."""
    lines, indent, opened = textwrap.dedent(text).split("\n"), "", False
    for place, line in enumerate(lines):
        fence = FENCE.fullmatch(line)
        if fence and (not opened or fence["indent"] == indent):
            indent, opened = fence["indent"], not opened
        if opened:
            lines[place] = line.removeprefix(indent)
    return "\n".join(lines)


def inside_of_fence(text: str) -> str:
    """What the first fenced block holds, or what stands before a fence that closes the prompt's own."""
    lines = text.strip("\n").split("\n")
    fences = [place for place, line in enumerate(lines) if FENCE.fullmatch(line)]
    start = fences.pop(0) + 1 if fences and not any(line.strip() for line in lines[: fences[0]]) else 0
    return "\n".join(lines[start : fences[0] if fences else None])


def first_line_indented(body: str) -> str:
    """A function's body whose first line has lost spaces, which some tokenizers drop where a text begins."""
    first, _, rest = body.lstrip("\n").partition("\n")
    depths = [len(line) - len(line.lstrip()) for line in rest.split("\n") if line.strip()]
    return " " * (min(depths, default=0) or 4) + first.lstrip() + "\n" + rest


# --- runs of lines that parse -----------------------------------------------------------------------------------------


def runs(text: str, left: list[int], numbered_from: int = 0) -> list[Statement]:
    """The statements of all runs of lines that parse, each as long as it can be; ``left[0]``: characters that may still
    be parsed."""
    found: list[Statement] = []
    lines, place, number = text.split("\n"), 0, numbered_from
    while place < len(lines) and left[0] > 0:
        count = 0
        if BEGINS.match(lines[place]):
            count, tree = longest(lines[place:], left)
            if count and tree is not None:
                following = next((line for line in lines[place + count :] if line.strip()), "")
                found += statements_of(lines, place, tree, number, following[:1].isspace())
                number += 1
        place += count or 1
    return found


def longest(lines: Sequence[str], left: list[int]) -> tuple[int, ast.Module | None]:
    """How many of the lines parse together from the first on, and their tree."""
    count = len(lines)
    while count and left[0] > 0:
        source = "\n".join(lines[:count])
        left[0] -= len(source) + 1
        try:
            return count, ast.parse(source)
        except SyntaxError as error:
            good = (error.lineno or count) - 1
        except (ValueError, RecursionError, MemoryError):  # too deep: it is hardly the fault of a short line
            good = max(range(count), key=lambda place: len(lines[place]))
        count = min(good, count - 1)
    return 0, None


def statements_of(lines: Sequence[str], first_line: int, tree: ast.Module, run: int, cut: bool) -> Iterator[Statement]:
    """Those of a run that compile; of the last one it is said whether it is ``cut``."""
    end = first_line
    for place, node in enumerate(tree.body):
        start = first_line - 1 + min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
        before, after = lines[end:start], first_line + (node.end_lineno or node.lineno)
        following = tree.body[place + 1].lineno if place + 1 < len(tree.body) else 0
        shares = start < end or following == node.end_lineno
        end = after
        try:
            source = ast.unparse(node) if shares else "\n".join(lines[start:after])
            compile(source, "program", "exec")
            gap = "".join(f"{line}\n" for line in before)
            one = Statement(run, place, gap, source, after, node, not (cut and node is tree.body[-1]))
            note_names(one)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        yield one


def note_names(one: Statement) -> None:
    table = symtable.symtable(one.source, "program", "exec")
    for symbol in table.get_symbols():
        if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace():
            one.binds.add(symbol.get_name())
        if symbol.is_referenced():
            one.uses.add(symbol.get_name())
    inner = list(table.get_children())
    while inner:
        scope = inner.pop()
        one.uses |= {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global()}
        inner += scope.get_children()
    if not (one.defines or one.imports or is_main_guard(one.node)):
        one.changes = set(changed_names(one.node))


def changed_names(statement: ast.stmt) -> Iterator[str]:
    """Names whose value a statement changes: ``table[i] = ...``, ``memo.update(...)``, ``sys.setrecursionlimit(...)``;
    for an assignment to a name only what the name is."""
    plain = isinstance(statement, (ast.Assign, ast.AnnAssign))
    for node in ast.walk(statement):
        if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, (ast.Store, ast.Del)):
            yield root(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not plain:
            yield root(node) if node.func.attr not in SETS_LIMITS else f"{root(node)}.{node.func.attr}"


def root(node: ast.expr) -> str:
    """The name in front: ``a`` of ``a.b[1].c()``; "" where it is none."""
    while True:
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        elif isinstance(node, ast.Call):
            node = node.func
        else:
            return node.id if isinstance(node, ast.Name) else ""


def is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and any(
        isinstance(inner, ast.Name) and inner.id == "__name__" for inner in ast.walk(node.test)
    )


def is_stub(one: Statement) -> bool:
    """Whether it is a definition without a body: a docstring, ``pass``, ``...`` or NotImplementedError alone."""
    if not one.defines:
        return False
    return all(
        isinstance(inner, ast.Pass)
        or isinstance(inner, ast.Expr)
        and isinstance(inner.value, ast.Constant)
        or isinstance(inner, ast.Raise)
        and "NotImplemented" in ast.dump(inner)
        for inner in one.node.body  # type: ignore[attr-defined]
    ) and not isinstance(one.node, ast.ClassDef)


def gives_back(one: Statement) -> bool:
    """Whether it may give a value: a function with ``return`` or ``yield``, and whatever is no function."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    gives = (ast.Return, ast.Yield, ast.YieldFrom)
    return not isinstance(one.node, functions) or any(isinstance(inner, gives) for inner in ast.walk(one.node))


# --- what is needed ---------------------------------------------------------------------------------------------------


def program_of(statements: Sequence[Statement], kept: set[Statement], names: Sequence[str], first: bool) -> str:
    """``kept`` and the statements that ``names`` need, in order; ``first``: of as good definitions the first counts."""
    known: set[str] = set()
    wanted: list[tuple[str, int | None]] = [(name, None) for name in names]
    by_name: dict[str, list[Statement]] = {}
    for one in statements:
        for name in one.binds:
            if not is_main_guard(one.node):
                by_name.setdefault(name, []).append(one)
    while wanted:
        name, run = wanted.pop()
        if name in known:
            continue
        known.add(name)
        chosen = choose(name, by_name.get(name, []), run, first)
        if name in ANY_NAME:
            chosen = [one for one in statements if one.run == run and (one.binds and not is_main_guard(one.node))]
        for one in chosen:
            if one not in kept:
                kept.add(one)
                wanted += [(used, one.run) for used in one.uses]
        if not wanted:
            touching = [one for one in statements if one not in kept and is_change_of(one, kept, known)]
            kept.update(touching)
            wanted += [(used, one.run) for one in touching for used in one.uses]
    told = [one for one in statements if one in kept or is_always_kept(one)]
    told.sort(key=lambda one: (not is_future(one), one.run))
    seen = {(one.run, one.place) for one in told} | {(one.run, -1) for one in told}
    return "".join(f"{one.before if (one.run, one.place - 1) in seen else ''}{one.source}\n" for one in told)


def choose(name: str, binding: Sequence[Statement], run: int | None, first: bool) -> list[Statement]:
    """Of the statements that bind a name, in order, those that count for one in ``run`` (None: in any)."""
    for good in (lambda one: not is_stub(one), gives_back, lambda one: one.whole):
        binding = [one for one in binding if good(one)] or binding
    if not binding:
        return []
    place = 0 if first else -1
    if run is None:
        near = binding[place].run
    else:
        near = min((one.run for one in binding), key=lambda other: (other > run, abs(other - run)))
    group = [one for one in binding if one.run == near]
    if any(name in one.uses and not one.defines for one in group):  # it is wrapped: f = cache(f)
        return group
    chosen = group[place]
    return [chosen] if chosen.defines else [one for one in group if not one.defines]


def is_change_of(one: Statement, kept: set[Statement], known: set[str]) -> bool:
    """Whether it changes what a kept assignment of its run has made, or a limit of the interpreter that is imported;
    of imported modules an assignment alone changes something."""
    for name in one.changes & known:
        makers = [other for other in kept if name in other.binds and not other.defines]
        if any(other.run == one.run and not other.imports for other in makers):
            return True
        if any(other.imports for other in makers) and isinstance(one.node, (ast.Assign, ast.AugAssign)):
            return True
    return isinstance(one.node, ast.Expr) and any(name.partition(".")[2] in SETS_LIMITS for name in one.changes)


def is_future(one: Statement) -> bool:
    return isinstance(one.node, ast.ImportFrom) and one.node.module == "__future__"


def is_always_kept(one: Statement) -> bool:
    return is_future(one) or isinstance(one.node, ast.ImportFrom) and any(name.name == "*" for name in one.node.names)
