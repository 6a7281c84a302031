"""hopkit: higher-order operators for PyTorch, defined once."""

from importlib.metadata import version

from hopkit._torch.levels import anywhere, batched
from hopkit.define import adopt, define, ops, plugins, register, undefine, unregister
from hopkit.errors import (
    AutogradError,
    CallError,
    CaptureError,
    DataDependentError,
    DuplicateOpError,
    HopkitError,
    HopkitWarning,
    LayoutError,
    PluginError,
    PropertyError,
    RuleConflictError,
    RuleError,
    SignatureError,
    SpecError,
    SubgraphError,
    UnknownOpError,
)
from hopkit.explain import Explanation, explain
from hopkit.flatten import flatten
from hopkit.hookspecs import hookimpl
from hopkit.manager import PluginInfo
from hopkit.op import Op, decompose
from hopkit.spec import OpSpec, Sample, Subgraph

__version__ = version("hopkit")

__all__ = [
    "AutogradError",
    "CallError",
    "CaptureError",
    "DataDependentError",
    "DuplicateOpError",
    "Explanation",
    "HopkitError",
    "HopkitWarning",
    "LayoutError",
    "Op",
    "OpSpec",
    "PluginError",
    "PluginInfo",
    "PropertyError",
    "RuleConflictError",
    "RuleError",
    "Sample",
    "SignatureError",
    "SpecError",
    "Subgraph",
    "SubgraphError",
    "UnknownOpError",
    "__version__",
    "adopt",
    "anywhere",
    "batched",
    "decompose",
    "define",
    "explain",
    "flatten",
    "hookimpl",
    "ops",
    "plugins",
    "register",
    "undefine",
    "unregister",
]
