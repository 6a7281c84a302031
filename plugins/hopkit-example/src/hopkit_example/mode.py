"""A mode of the plugin's own: ``with LogOps() as log:`` writes down every op and operator, and ops are taken whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from hopkit.extend import Call, OpSpec, Rule, hookimpl
from hopkit.extend.mode import Mode, TorchDispatchMode


class LogOps(TorchDispatchMode):
    """Collects ``names``. It knows nothing of hopkit: what it does with an op is said by the rule below."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self.names: list[str] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Called by torch for every operator."""
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@hookimpl
def hopkit_add_modes() -> Iterable[Mode]:
    """Brings the mode, and with it the hook ``hopkit_log_ops_rule``."""
    return [Mode("log_ops", entry=LogOps, gives="the op's value, with its name in the log")]


@hookimpl
def hopkit_log_ops_rule(op: OpSpec) -> Rule:  # noqa: ARG001 - the hook's own; the answer is the same for every op
    """The one rule of the mode. It serves every op there is, and every op to come."""
    return log_whole


def log_whole(active: LogOps, call: Call) -> object:
    """Note the op, and let the next mode answer. While the rule runs, the mode is off: the inside is not logged."""
    active.names.append(call.op.name)
    return call()
