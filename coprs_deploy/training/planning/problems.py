"""Problems that are found before a run starts, all of them in one table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from coprs_deploy.data.examples import REPORTED, ExampleFile, ExampleSource
from coprs_deploy.errors import CoPRSError


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a recipe, its data, or the machine.

    Attributes:
        where: key of the recipe, with a row and column of its file, or a name as in ``disk``.
        text: what was found, what is accepted, and the fix.
        is_error: whether a run is refused; else it is a warning.
        count: number of rows that it stands for.
    """

    where: str
    text: str
    is_error: bool = True
    count: int = 1

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


class ProblemsError(CoPRSError, ValueError):
    """A run is refused.

    Attributes:
        problems: the errors, and warnings.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(describe_problems(problems))
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


def require_none(problems: Sequence[Problem]) -> None:
    """Refuse a run with an error.

    Raises:
        ProblemsError: there is one; warnings are listed with it.
    """
    if any(problem.is_error for problem in problems):
        raise ProblemsError(problems)


def describe_problems(problems: Sequence[Problem]) -> str:
    """Return a line with the counts, and the problems as a table, errors first."""
    errors = [each for each in problems if each.is_error]
    others = [each for each in problems if not each.is_error]
    counts = [
        f"{len(group)} {noun}{'s' if len(group) > 1 else ''}"
        for group, noun in ((errors, "error"), (others, "warning"))
        if group
    ]
    rows = [("error", each) for each in errors] + [("warning", each) for each in others]
    width = max((len(each.where) for each in problems), default=0)
    lines = [f"{kind:<7}  {each.where:<{width}}  {each.text}" for kind, each in rows]
    return "\n".join(
        [f"{' and '.join(counts) or 'no problem'} found before the first step", *lines]
    )


@contextmanager
def reporting(problems: list[Problem], where: str) -> Iterator[None]:
    """Turn an error that a user can fix into a problem."""
    try:
        yield
    except (CoPRSError, ValueError, OSError) as error:
        problems.append(Problem(where, str(error)))


def row_problems(where: str, source: ExampleSource) -> list[Problem]:
    """List what is left out: the first invalid rows each, the others as one, and columns."""
    listed = [
        Problem(
            f"{where}, row {each.row}{each.column and f', {each.column}'}",
            f"{each.reason}; the row is left out",
            is_error=False,
        )
        for each in source.problems[:REPORTED]
    ]
    if more := len(source.problems) - REPORTED:
        text = f"{more:,} more invalid rows are left out; `coprs-deploy data inspect --json` lists"
        if more > 0:
            listed.append(Problem(where, f"{text} all", is_error=False, count=more))
    if isinstance(source, ExampleFile) and source.ignored_columns:
        listed.append(Problem(where, source.describe_ignored(), is_error=False))
    return listed


def named(ids: Iterable[str]) -> str:
    """Count and name examples, with a verb."""
    ids = list(ids)
    more = ", ..." if len(ids) > REPORTED else ""
    verb = "example has" if len(ids) == 1 else "examples have"
    return f"{len(ids):,} {verb} ({', '.join(ids[:REPORTED])}{more})"
