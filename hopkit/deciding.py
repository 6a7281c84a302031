"""What becomes of a body that decides on a tensor's value where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hopkit._torch import sizes
from hopkit._torch.fakes import rehearsing
from hopkit.errors import DataDependentError
from hopkit.spec import OpSpec

_HERE = "cannot run here"


def no_value(op: str, what: str, error: Exception, *, why: str, todo: str) -> DataDependentError:
    """The error of an op whose body asked for a value that there is none of.

    Args:
        op: Its name.
        what: What cannot be done with it.
        error: What torch raised.
        why: Why that matters.
        todo: What to do next.
    """
    found = f"{what}: its body decides on a tensor's value ({str(error).splitlines()[0]})"
    return DataDependentError(f"op '{op}'", found, why=why, todo=todo)


@contextlib.contextmanager
def deciding(spec: OpSpec) -> Iterator[None]:
    """Inside, the body of an op runs in the place of the op.

    Raises:
        DataDependentError: It asks for a value, and runs on stand-ins or on what a tracer follows.
    """
    try:
        yield
    except Exception as error:
        if not spec.stood_for or rehearsing() or not sizes.data_dependent(error):
            raise
        raise no_value(
            spec.name,
            _HERE,
            error,
            why="a mode, a tensor class or a transform sees the inside of the op, where tensors have no values",
            todo="Record the op outside of it, or let it take the op whole, by a rule for the mode",
        ) from error


def undecided(error: object) -> bool:
    """Whether this is such an error: the body alone could not run there either."""
    return isinstance(error, DataDependentError) and error.found.startswith(_HERE)
