"""Plugins: found, chosen, loaded, validated, listed; and what happens when one is broken."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import hopkit
import hopkit.installed
from hopkit import HopkitWarning, kit
from hopkit.extend import Mode, OpSpec, PluginError, Rule, hookimpl
from hopkit.kit import Kit, fresh
from tests.fresh import python


@pytest.fixture(autouse=True)
def host() -> Iterator[Kit]:
    with fresh() as host:
        yield host


Apply = hopkit.Op[[hopkit.Subgraph, Tensor], Tensor]


def define(name: str = "t_apply") -> Apply:
    @hopkit.define(name)
    def apply(body: hopkit.Subgraph, x: Tensor) -> Tensor:
        return body(x)

    return apply


def value(op: Apply) -> float:
    return op(torch.sin, torch.zeros(1)).item()


def twos(body: hopkit.Subgraph, x: Tensor) -> Tensor:
    return torch.full_like(x, 2)


def info(name: str) -> hopkit.PluginInfo:
    (found,) = [info for info in hopkit.plugins() if info.name == name]
    return found


class Twos:
    """Answers for every op: it is 2."""

    @hookimpl
    def hopkit_device_rule(self, op: OpSpec) -> Rule:
        return twos


def registries(host: Kit) -> object:
    """All that a plugin can change."""
    listed = [(info.name, info.hooks, info.modes) for info in host.plugins.infos({}, {}) if info.state == "loaded"]
    tables = [(name, dict(op.table), set(op.operator.py_kernels)) for name, op in host.ops.items()]
    return listed, tables, [name for name in dir(torch.ops.higher_order) if name.startswith("t_")], host.plugins.modes


# By hand


def test_a_plugin_is_registered_under_its_name_and_taken_away_by_itself_or_by_name() -> None:
    op, plugin = define(), Twos()
    assert hopkit.register(plugin) == "Twos"
    assert value(op) == 2
    hopkit.unregister(plugin)
    assert hopkit.register(plugin, "mine") == "mine"
    hopkit.unregister("mine")
    assert value(op) == 0


def test_a_module_or_a_class_may_be_a_plugin() -> None:
    class Static:
        @staticmethod
        @hookimpl
        def hopkit_device_rule(op: OpSpec) -> Rule:
            return twos

    op = define()
    assert hopkit.register(Static) == "Static"
    assert value(op) == 2


def test_a_hook_need_not_take_what_it_does_not_read() -> None:
    def hopkit_device_rule() -> Rule:
        return twos

    op = define()
    hopkit.register(SimpleNamespace(hopkit_device_rule=hookimpl(hopkit_device_rule)), "brief")
    assert value(op) == 2


@pytest.mark.parametrize("again", ["same object", "same name"])
def test_registering_twice_is_an_error(again: str, host: Kit) -> None:
    plugin = Twos()
    hopkit.register(plugin, "twos")
    before = registries(host)
    with pytest.raises(PluginError, match="is registered already"):
        hopkit.register(plugin if again == "same object" else Twos(), "twos" if again == "same name" else "other")
    assert registries(host) == before


@pytest.mark.parametrize(
    ("who", "why"), [("nobody", "is not registered"), ("hopkit.rules.device", "one of hopkit's own")]
)
def test_what_is_not_there_or_hopkit_s_own_cannot_be_taken_away(who: str, why: str) -> None:
    with pytest.raises(PluginError, match=why):
        hopkit.unregister(who)


def test_the_listing_says_what_a_plugin_supplies() -> None:
    op = define()

    class Brings(Twos):
        @hookimpl
        def hopkit_add_ops(self) -> list[Apply]:
            return [op]

    hopkit.register(Brings(), "brings")
    assert info("brings") == hopkit.PluginInfo(
        "brings", hooks=("hopkit_add_ops", "hopkit_device_rule"), ops=("t_apply",)
    )
    builtin = hopkit.plugins()[0]
    assert builtin.builtin
    assert (builtin.distribution, builtin.version) == ("hopkit", hopkit.__version__)


def test_a_plugin_hears_of_every_op_once_whether_it_was_there_before_or_not() -> None:
    heard = []

    class Listener:
        @hookimpl
        def hopkit_op_defined(self, op: OpSpec) -> None:
            heard.append(op.name)

    define("t_before")
    hopkit.register(Listener(), "listener")
    hopkit.register(Twos(), "twos")
    define("t_after")
    assert heard == ["t_before", "t_after"]


class Everywhere:
    """Answers for every op in every built-in mode: as the built-in rule does, and remembers that it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def _like_builtin(self, mode: str, op: OpSpec) -> Rule:
        hook = getattr(importlib.import_module(f"hopkit.rules.{mode}"), f"hopkit_{mode}_rule")
        answer = hook(op=op)

        @functools.wraps(answer)
        def rule(*args: object, **kwargs: object) -> object:
            self.asked.append(mode)
            return answer(*args, **kwargs)

        return rule

    @hookimpl
    def hopkit_autograd_rule(self, op: OpSpec) -> Rule:
        return self._like_builtin("autograd", op)

    @hookimpl
    def hopkit_functionalize_rule(self, op: OpSpec) -> Rule:
        return self._like_builtin("functionalize", op)

    @hookimpl
    def hopkit_proxy_rule(self, op: OpSpec) -> Rule:
        return self._like_builtin("proxy", op)

    @hookimpl
    def hopkit_fake_rule(self, op: OpSpec) -> Rule:
        return self._like_builtin("fake", op)

    @hookimpl
    def hopkit_device_rule(self, op: OpSpec) -> Rule:
        return self._like_builtin("device", op)


def test_a_plugin_is_asked_in_every_mode() -> None:
    op, plugin = define(), Everywhere()
    hopkit.register(plugin)
    x = torch.rand(3, requires_grad=True)
    torch.testing.assert_close(op(torch.sin, x), x.sin())
    assert plugin.asked == ["autograd", "device"]
    plugin.asked.clear()
    graph = make_fx(torch.func.functionalize(lambda x: op(torch.sin, x)), tracing_mode="fake")(x.detach())
    torch.testing.assert_close(graph(x.detach()), x.detach().sin())
    assert set(plugin.asked) == {"autograd", "functionalize", "proxy", "fake", "device"}


# Broken plugins


def written(**attributes: object) -> SimpleNamespace:
    return SimpleNamespace(**attributes)


def marked(function: Callable[..., object]) -> Callable[..., object]:
    return hookimpl(function)


def raises(op: OpSpec) -> Rule:
    raise ValueError("out of paint")


class Unheard(torch.Tensor):
    """torch never asks it: it has no ``__torch_dispatch__``."""


BROKEN = {
    "misspelt": (
        written(hopkit_devise_rule=marked(lambda op: twos)),
        r"'broken' has 'hopkit_devise_rule', which is no hook; did you mean 'hopkit_device_rule'\?.*The hooks are",
    ),
    "misspelt and not marked": (written(hopkit_device_rules=lambda op: twos), "which is no hook; did you mean"),
    "not marked": (written(hopkit_device_rule=lambda op: twos), "is not a function marked with @hookimpl"),
    "no function": (written(hopkit_device_rule={"cpu": twos}), "is not a function marked with @hookimpl"),
    "of a mode that nobody brought": (
        written(hopkit_tile_rule=marked(lambda op: twos)),
        "'hopkit_tile_rule', which is no",
    ),
    "empty": (written(), "plugin 'broken' answers no hook"),
    "wrong argument": (
        written(hopkit_device_rule=marked(lambda operator: twos)),
        r"hook 'hopkit_device_rule' takes \(operator\).*Write `def hopkit_device_rule\(op\)`",
    ),
    "an argument too many": (
        written(hopkit_add_ops=marked(lambda op: ())),
        r"hook 'hopkit_add_ops' takes \(op\).*Write `def hopkit_add_ops\(\)`",
    ),
    "raising": (
        written(hopkit_device_rule=marked(raises)),
        "plugin 'broken', hook 'hopkit_device_rule', op 't_apply' raised ValueError: out of paint",
    ),
    "gives no rule": (written(hopkit_device_rule=marked(lambda op: 7)), "op 't_apply' gave 7, a int.*takes"),
    "gives a rule with another signature": (
        written(hopkit_fake_rule=marked(lambda op: lambda x: x)),
        r"gave a rule that takes \(x\).*Give a function that takes \(body: Subgraph, x: Tensor\)",
    ),
    "gives a rule for no device": (written(hopkit_device_rule=marked(lambda op: {"tpu9": twos})), "device 'tpu9'"),
    "brings what is no mode": (written(hopkit_add_modes=marked(lambda: ["tile"])), "'hopkit_add_modes' gave 'tile'"),
    "brings one mode, not several": (written(hopkit_add_modes=marked(lambda: 7)), "'hopkit_add_modes' gave 7"),
    "brings a mode that torch never asks": (
        written(hopkit_add_modes=marked(lambda: [Mode("tile", Unheard, "tiles")])),
        "'hopkit_add_modes' gave Mode",
    ),
    "raises when asked for modes": (written(hopkit_add_modes=marked(lambda: 1 // 0)), "raised ZeroDivisionError"),
    "brings what is no op": (written(hopkit_add_ops=marked(lambda: [twos])), "'hopkit_add_ops' gave <function twos"),
    "exits": (written(hopkit_device_rule=marked(lambda op: sys.exit(3))), "raised SystemExit: 3"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_refused_by_name_and_changes_nothing(case: str, host: Kit) -> None:
    plugin, message = BROKEN[case]
    define()
    hopkit.register(Twos(), "good")
    before = registries(host)
    with pytest.raises(PluginError, match=message):
        hopkit.register(plugin, "broken")
    assert registries(host) == before
    hopkit.register(written(hopkit_fake_rule=marked(lambda op: None)), "broken")  # the name is free


def test_an_op_of_a_plugin_that_is_refused_goes_with_it(host: Kit) -> None:
    def half() -> Iterator[Apply]:
        yield define("t_half")
        raise ValueError("out of paint")

    before = registries(host)
    with pytest.raises(PluginError, match="plugin 'broken', hook 'hopkit_add_ops' raised ValueError: out of paint"):
        hopkit.register(written(hopkit_add_ops=marked(half)), "broken")
    assert registries(host) == before


def test_a_plugin_is_asked_for_its_ops_once() -> None:
    class Defines:
        @hookimpl
        def hopkit_add_ops(self) -> list[Apply]:
            return [define("t_late")]

    hopkit.register(Defines(), "defines")
    for _ in range(2):
        assert [info.ops for info in hopkit.plugins() if info.name == "defines"] == [("t_late",)]


def test_names_in_hookimpl_are_strings() -> None:
    op = define()
    with pytest.raises(TypeError, match=r"takes names in op=, such as 'demo_twice', not <op t_apply"):
        hookimpl(op=op)  # type: ignore[call-overload] # the mistake


def test_a_plugin_that_raises_for_a_later_op_is_told_of_and_passed_over() -> None:
    def picky(op: OpSpec) -> Rule | None:
        if op.name == "t_later":
            raise ValueError("out of paint")
        return None

    hopkit.register(written(hopkit_device_rule=marked(picky)), "picky")
    with pytest.warns(HopkitWarning, match="plugin 'picky'.*out of paint"):
        later = define("t_later")
    hopkit.register(Twos(), "twos")  # every op asks again: what was told is not told twice
    assert value(later) == 2
    assert info("picky").state == "faulty"


def test_a_listener_that_raises_is_told_of_and_the_op_is_there() -> None:
    hopkit.register(written(hopkit_op_defined=marked(raises)), "listener")
    with pytest.warns(
        HopkitWarning, match="plugin 'listener', hook 'hopkit_op_defined', op 't_apply' raised ValueError"
    ):
        op = define()
    assert value(op) == 0
    assert info("listener").state == "faulty"


# Installed plugins


@dataclasses.dataclass(frozen=True)
class FakeDistribution:
    name: str
    version: str


class Installed:
    """Makes modules and lets them be found as installed plugins."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._monkeypatch, self._entries = tmp_path, monkeypatch, list[EntryPoint]()
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(hopkit.installed, "entry_points", lambda group: list(self._entries))

    def add(self, name: str, code: str = "", *, module: str = "") -> None:
        module = module or f"t_plugin_{name}"
        header = "from __future__ import annotations\nimport hopkit, torch\nfrom hopkit.extend import *\n"
        (self._folder / f"{module}.py").write_text(header + code)
        self._monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.invalidate_caches()
        entry = EntryPoint(name, module, "hopkit")
        vars(entry)["dist"] = FakeDistribution(f"dist-{name}", "1.2")
        self._entries.append(entry)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: Kit) -> Iterator[Installed]:
    host = Kit()
    monkeypatch.setattr(kit, "_kit", host)
    for variable in ("HOPKIT_PLUGINS", "HOPKIT_BLOCK"):
        monkeypatch.delenv(variable, raising=False)
    yield Installed(tmp_path, monkeypatch)
    for op in list(host.ops.values()):
        hopkit.undefine(op)
    for module in [name for name in sys.modules if name.startswith("t_plugin_")]:
        del sys.modules[module]


TWOS = """
@hookimpl
def hopkit_device_rule(op):
    return lambda body, x: torch.full_like(x, 2)
"""
OP = """
@hopkit.define("t_{0}")
def op(body: hopkit.Subgraph, x: torch.Tensor) -> torch.Tensor:
    return body(x)

@hookimpl
def hopkit_add_ops():
    return [op]
"""
MODE = """
from hopkit.extend.mode import TorchDispatchMode

class Tiling(TorchDispatchMode):
    pass

@hookimpl
def hopkit_add_modes():
    return [Mode("tile", Tiling, "tiles")]
"""
TILES = """
@hookimpl
def hopkit_tile_rule(op):
    return lambda entry, call: call()
"""


def loaded() -> list[str]:
    return [info.name for info in hopkit.plugins() if not info.builtin and info.state != "failed"]


def test_an_installed_plugin_serves_the_first_call(installed: Installed) -> None:
    installed.add("twos", TWOS)
    assert value(define()) == 2


def test_an_installed_plugin_is_listed_with_its_distribution(installed: Installed) -> None:
    installed.add("brings", OP.format("brought"))
    expected = hopkit.PluginInfo("brings", "dist-brings", "1.2", ("hopkit_add_ops",), ops=("t_brought",))
    assert [info for info in hopkit.plugins() if not info.builtin] == [expected]
    assert "t_brought" in hopkit.ops()


@pytest.mark.parametrize("order", [(MODE, TILES), (TILES, MODE)], ids=["bringer first", "server first"])
def test_a_mode_of_one_plugin_is_served_by_another_in_either_order(
    installed: Installed, order: tuple[str, str]
) -> None:
    for i, code in enumerate(order):
        installed.add(f"p{i}", code)
    assert loaded() == ["p0", "p1"]
    assert define().table["tile"][0].plugin.startswith("p")


def test_one_that_serves_a_mode_falls_with_the_one_that_brought_it(installed: Installed) -> None:
    installed.add("server", TILES)
    installed.add("bringer", MODE + "\n@hookimpl\ndef hopkit_misspelt_rule(op): ...\n")
    with pytest.warns(HopkitWarning) as told:
        assert loaded() == []
    assert [name in str(w.message) for w, name in zip(told, ["'bringer'", "'server'"], strict=True)] == [True, True]


BROKEN_CODE = {
    "raises at import": ("raise RuntimeError('no paint')", "cannot be imported.*RuntimeError: no paint"),
    "imports what is not there": ("import no_such_module_at_all", "ModuleNotFoundError"),
    "misspelt": ("@hookimpl\ndef hopkit_devise_rule(op): ...\n", "did you mean 'hopkit_device_rule'"),
    "wrong argument": ("@hookimpl\ndef hopkit_device_rule(spec): ...\n", r"takes \(spec\)"),
    "raises when asked for modes": ("@hookimpl\ndef hopkit_add_modes(): 1 / 0\n", "ZeroDivisionError"),
    "raises when asked for ops": ("@hookimpl\ndef hopkit_add_ops(): 1 / 0\n", "ZeroDivisionError"),
    "brings what is no op": ("@hookimpl\ndef hopkit_add_ops(): return ['t_half']\n", "'hopkit_add_ops' gave 't_half'"),
    "exits": ("import sys; sys.exit('no paint')", "cannot be imported.*SystemExit: no paint"),
    "raises what is no Exception": ("class Odd(BaseException): pass\nraise Odd('no paint')", "Odd: no paint"),
}


@pytest.mark.parametrize("case", BROKEN_CODE)
def test_a_broken_installed_plugin_is_told_of_and_the_others_serve(installed: Installed, case: str) -> None:
    code, message = BROKEN_CODE[case]
    installed.add("broken", OP.format("half") + code)
    installed.add("twos", TWOS)
    op = define()
    with pytest.warns(HopkitWarning, match=f"plugin 'broken'.*{message}"):
        assert value(op) == 2
    assert loaded() == ["twos"]
    assert (info("broken").state, info("broken").distribution) == ("failed", "dist-broken")
    assert set(hopkit.ops()) == {"t_apply"}
    assert not hasattr(torch.ops.higher_order, "t_half")


FAULTY_CODE = {
    "raises": ("@hookimpl\ndef hopkit_device_rule(op): 1 / 0\n", "op 't_apply' raised ZeroDivisionError"),
    "gives no rule": ("@hookimpl\ndef hopkit_fake_rule(op): return object()\n", "op 't_apply' gave <object object"),
    "gives another signature": ("@hookimpl\ndef hopkit_proxy_rule(op): return lambda: 0\n", r"takes \(\)"),
    "raises when it hears of an op": ("@hookimpl\ndef hopkit_op_defined(op): 1 / 0\n", "raised ZeroDivisionError"),
}


@pytest.mark.parametrize("case", FAULTY_CODE)
def test_an_installed_plugin_whose_hook_fails_is_told_of_once_and_listed_as_faulty(
    installed: Installed, case: str
) -> None:
    code, message = FAULTY_CODE[case]
    installed.add("broken", code)
    installed.add("twos", TWOS)
    op = define()
    with pytest.warns(HopkitWarning, match=f"plugin 'broken'.*{message}") as told:
        assert value(op) == 2
    hopkit.unregister("twos")  # every op asks again, and a second warning would be an error
    assert info("broken").state == "faulty"
    assert [str(warning.message) for warning in told] == [info("broken").error]


def test_of_many_faults_the_first_is_listed_and_the_others_are_counted(installed: Installed) -> None:
    installed.add("broken", FAULTY_CODE["raises"][0])
    for i in range(3):
        define(f"t_{i}")
    with pytest.warns(HopkitWarning):
        hopkit.plugins()
    assert "op 't_0'" in info("broken").error
    assert info("broken").error.endswith("(And 2 more.)")


def test_a_hook_for_one_op_hears_of_no_other(installed: Installed) -> None:
    installed.add("broken", "@hookimpl(op='t_other')\ndef hopkit_op_defined(op): 1 / 0\n")
    define()
    assert info("broken").state == "loaded"


def test_what_a_broken_plugin_imported_stays(installed: Installed) -> None:
    installed.add("broken", "import t_plugin_good\nraise RuntimeError('no paint')")
    installed.add("good", OP.format("good"))
    with pytest.warns(HopkitWarning, match="no paint"):
        assert set(hopkit.ops()) == {"t_good"}


def test_warnings_as_errors_leave_everything_in_order(installed: Installed) -> None:
    installed.add("broken", "raise RuntimeError('no paint')")
    installed.add("twos", TWOS)
    op = define()
    with pytest.raises(HopkitWarning, match="no paint"):
        value(op)
    assert value(op) == 2


def test_warnings_as_errors_do_not_stop_another_plugin(installed: Installed) -> None:
    installed.add("broken", "raise RuntimeError('no paint')")
    installed.add("brings", OP.format("brought"))
    with pytest.raises(HopkitWarning, match="no paint"):
        hopkit.ops()
    assert loaded() == ["brings"]


def test_an_import_that_is_interrupted_is_begun_again(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    installed.add("twos", TWOS)
    installed.add("slow", "import os\nif 'T_INTERRUPTED' in os.environ: raise KeyboardInterrupt\n" + OP.format("slow"))
    monkeypatch.setenv("T_INTERRUPTED", "1")
    op = define()
    with pytest.raises(KeyboardInterrupt):
        value(op)
    monkeypatch.delenv("T_INTERRUPTED")
    assert value(op) == 2
    assert loaded() == ["twos", "slow"]


def test_two_installed_plugins_in_one_place_are_told_of_where_it_matters(installed: Installed) -> None:
    installed.add("a", TWOS)
    installed.add("b", TWOS.replace("2", "3"))
    op = define()
    assert loaded() == ["a", "b"]
    for _ in range(2):
        with pytest.raises(hopkit.RuleConflictError, match="'a' and 'b'"):
            value(op)
    for name in "ab":
        assert info(name).state == "faulty"
        assert "op 't_apply' in mode 'device' is claimed by plugins 'a' and 'b'" in info(name).error
    hopkit.unregister("b")
    assert value(op) == 2
    assert info("a") == hopkit.PluginInfo("a", "dist-a", "1.2", ("hopkit_device_rule",))


def test_a_conflict_that_a_third_plugin_settles_is_none(installed: Installed) -> None:
    installed.add("a", TWOS)
    installed.add("b", TWOS)
    installed.add("referee", TWOS.replace("@hookimpl", "@hookimpl(overrides=('a', 'b'))"))
    define()
    assert [info(name).state for name in ("a", "b", "referee")] == ["loaded"] * 3


def test_two_distributions_with_one_name_are_told_of(installed: Installed) -> None:
    installed.add("twos", TWOS)
    installed.add("twos", TWOS, module="t_plugin_other")
    with pytest.warns(HopkitWarning, match=r"plugin 'twos' \(t_plugin_other.*is passed over"):
        assert loaded() == ["twos"]


def test_a_plugin_that_calls_its_op_while_it_is_imported_is_loaded_when_it_is_whole(installed: Installed) -> None:
    installed.add("eager", OP.format("eager") + "op(torch.sin, torch.zeros(1))\n" + TWOS)
    module = importlib.import_module("t_plugin_eager")
    assert value(module.op) == 2
    assert loaded() == ["eager"]


def test_an_author_s_rule_for_a_mode_of_an_installed_plugin(installed: Installed) -> None:
    installed.add("tiles", MODE)
    op = define()
    op.rule("tile")(lambda entry, call: call())
    assert op.table["tile"]


RULE = """
@op.rule("tile")
def rule(entry, call):
    return call()
"""


def test_a_plugin_s_own_op_has_a_rule_for_a_mode_of_a_plugin_that_is_loaded_later(installed: Installed) -> None:
    installed.add("first", OP.format("first") + RULE)
    installed.add("tiles", MODE)
    assert hopkit.ops()["t_first"].table["tile"]


def test_a_rule_for_a_mode_that_no_installed_plugin_brings_is_told_of(installed: Installed) -> None:
    installed.add("first", OP.format("first") + RULE)
    with pytest.warns(HopkitWarning, match="op 't_first' cannot have a rule in mode 'tile'"):
        assert loaded() == ["first"]


# HOPKIT_PLUGINS and HOPKIT_BLOCK


@pytest.mark.parametrize(
    ("plugins", "block", "expected"),
    [
        (None, None, ["a", "b", "c"]),
        ("", None, []),
        ("a", None, ["a"]),
        (" a , c ,", None, ["a", "c"]),
        (None, "b", ["a", "c"]),
        ("a,b", "b", ["a"]),
        (None, "", ["a", "b", "c"]),
        ("a,hopkit.rules.device", None, ["a"]),
    ],
)
def test_the_environment_chooses(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, plugins: str | None, block: str | None, expected: list[str]
) -> None:
    for name in "abc":
        installed.add(name, OP.format(name))
    for variable, names in (("HOPKIT_PLUGINS", plugins), ("HOPKIT_BLOCK", block)):
        if names is not None:
            monkeypatch.setenv(variable, names)
    assert loaded() == expected
    assert sorted(hopkit.ops()) == [f"t_{name}" for name in expected]


@pytest.mark.parametrize("variable", ["HOPKIT_PLUGINS", "HOPKIT_BLOCK"])
def test_a_name_that_is_not_installed_is_told_of_once(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    installed.add("eager", OP.format("eager") + "op(torch.sin, torch.zeros(1))\n" + TWOS)
    monkeypatch.setenv(variable, "nope")
    message = f"{variable} names plugin 'nope', which is not installed.*Installed are eager"
    with pytest.warns(HopkitWarning, match=message):
        importlib.import_module("t_plugin_eager")  # plugins are loaded, but for itself
    hopkit.plugins()  # the rest; a second warning would be an error


def test_a_built_in_plugin_cannot_be_blocked(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOPKIT_BLOCK", "hopkit.rules.device")
    message = "HOPKIT_BLOCK names plugin 'hopkit.rules.device', which is one of hopkit's own, and stays"
    with pytest.warns(HopkitWarning, match=message):
        hopkit.plugins()
    assert value(define()) == 0


@pytest.mark.parametrize(
    ("variables", "expected"), [({}, True), ({"HOPKIT_PLUGINS": ""}, False), ({"HOPKIT_BLOCK": "constgraph"}, False)]
)
def test_the_environment_chooses_among_what_is_really_installed(variables: dict[str, str], expected: bool) -> None:
    listed = "'constgraph' in [info.name for info in hopkit.plugins()]"
    program = f"import hopkit; print({listed}, 'constgraph_run' in hopkit.ops())"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HOPKIT_")} | variables
    done = python("-c", program, env=environment)
    assert done.stdout.split() == [str(expected)] * 2
