"""The columns of the matrix, a module for each group: each runs one sample of an op in one mode.

A column says what to compare with the body; whether it is the same is not its business.
"""

from collections.abc import Iterable

from hopkit.errors import PluginError
from hopkit.kit import current
from hopkit.testing.case import Column
from hopkit.testing.columns import aot, autograd, device, dynamo, export, fake, func, functionalize, inductor, proxy

_MODULES = (device, fake, autograd, functionalize, proxy, aot, dynamo, inductor, export, func)

COLUMNS: dict[str, Column] = {column.name: column for module in _MODULES for column in module.GROUP.columns}
"""Every built-in column by its name, in the order in which a report has them."""


def columns() -> dict[str, Column]:
    """Every column: the built-in ones, then those of plugins.

    Raises:
        PluginError: A plugin raised, or gave what is no column or has a name that is taken.
    """
    host = current()
    host.load()
    found = dict(COLUMNS)
    for impl in host.plugins.impls("hopkit_add_columns"):
        given = impl.ask()
        for column in given if isinstance(given, Iterable) else [given]:
            if not isinstance(column, Column) or column.name in found:
                raise PluginError(
                    impl.who(),
                    f"gave {column!r}",
                    why="it is no column, or there is one of this name, and a report could not tell them apart",
                    todo='Make a `hopkit.testing.Group("mine")`, mark functions with its `column`, give its `columns`',
                )
            found[column.name] = column
    return found
