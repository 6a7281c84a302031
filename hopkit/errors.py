"""Every exception that hopkit raises: one class per mistake that can be taught.

A message has four parts: who it is about, what was found, why it matters and what to do next.
"""

from __future__ import annotations

import re


class HopkitError(Exception):
    """Base of every error of hopkit. Catch it to catch them all."""

    def __init__(self, who: str, found: str, *, why: str, todo: str) -> None:
        self.who, self.found, self.why, self.todo = who, found, why, todo
        why, todo = why[:1].upper() + why[1:], todo[:1].upper() + todo[1:]
        super().__init__(f"{who} {found}. {why}. {todo}. See docs/reference/errors.md#{self.anchor()}.")

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (type(self), self.who, self.found, self.why, self.todo)

    @classmethod
    def anchor(cls) -> str:
        """The heading of this class in the error reference: ``DuplicateOpError`` -> ``duplicate-op``."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__.removesuffix("Error")).lower()


def _restore(kind: type[HopkitError], who: str, found: str, why: str, todo: str) -> HopkitError:
    return kind(who, found, why=why, todo=todo)


class SpecError(HopkitError):
    """An op cannot be defined as it was written: its name, a parameter, a property."""


class DuplicateOpError(SpecError):
    """An op's name is taken, by another op of hopkit or by one of torch's own."""


class UnknownOpError(HopkitError, LookupError):
    """No op has this name, or several have."""


class CallError(HopkitError, TypeError):
    """An op was called with arguments that do not fit its parameters."""


class SubgraphError(HopkitError):
    """A subgraph, or a body, did what no op can carry: it gave, or was given, something that is no tensor or number."""


class SignatureError(HopkitError):
    """A recorded subgraph was called on shapes, dtypes or devices that it was not recorded for."""


class CaptureError(HopkitError):
    """A subgraph closes over something that the mode at hand cannot carry."""


class DataDependentError(HopkitError):
    """A body decides on a tensor's value where only shapes are known, and ``inputs=`` or ``outputs=`` is missing."""


class PropertyError(HopkitError):
    """A subgraph mutates or aliases what its op did not declare (raised under ``HOPKIT_STRICT=1``)."""


class LayoutError(HopkitError):
    """A node cannot be written, for a constant that no text stands for; or read, as hopkit or the op has changed."""


class AutogradError(HopkitError, RuntimeError):
    """A derivative was asked of an op whose autograd policy or rule cannot give it."""


class RuleError(HopkitError):
    """A rule gave what its mode cannot use, or every rule in the chain declined."""


class PluginError(HopkitError):
    """A plugin could not be used: it failed to load, misspelt a hook, or supplied what fits no mode."""


class RuleConflictError(PluginError):
    """Two plugins supply a rule for the same op in the same mode, and neither says that it overrides."""


class HopkitWarning(UserWarning):
    """Something that hopkit got right at a cost that the author can avoid."""


def no_gradient(op: str) -> AutogradError:
    """For an op that was declared with ``autograd="error"``."""
    return AutogradError(
        f"op '{op}'",
        "was called with inputs that require gradients",
        why='its author declared `autograd="error"`',
        todo="Call it under torch.no_grad(), or on detached tensors",
    )
