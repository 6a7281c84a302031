"""The plugin author's face. The modules beside this one have one mode each: its rule's protocol, and typed steps."""

from hopkit.call import Call, GraphLike, Rehearsal
from hopkit.errors import (
    AutogradError,
    CaptureError,
    HopkitError,
    LayoutError,
    PluginError,
    RuleConflictError,
    RuleError,
    SignatureError,
)
from hopkit.hookspecs import hookimpl
from hopkit.modes import Mode
from hopkit.program import load_program
from hopkit.rule import Decline, Rule
from hopkit.spec import Kind, OpSpec, Parameter, Sample, Subgraph
from hopkit.table import table

__all__ = [
    "AutogradError",
    "Call",
    "CaptureError",
    "Decline",
    "GraphLike",
    "HopkitError",
    "Kind",
    "LayoutError",
    "Mode",
    "OpSpec",
    "Parameter",
    "PluginError",
    "Rehearsal",
    "Rule",
    "RuleConflictError",
    "RuleError",
    "Sample",
    "SignatureError",
    "Subgraph",
    "hookimpl",
    "load_program",
    "table",
]
