"""The columns of the matrix, a module for each group: each runs one sample of an op in one mode.

A column says what to compare with the body; whether it is the same is not its business.
"""

from hopkit.testing.case import Column
from hopkit.testing.columns import aot, autograd, device, dynamo, export, fake, func, functionalize, inductor, proxy

_MODULES = (device, fake, autograd, functionalize, proxy, aot, dynamo, inductor, export, func)

COLUMNS: dict[str, Column] = {column.name: column for module in _MODULES for column in module.GROUP.columns}
"""Every column by its name, in the order in which a report has them."""
