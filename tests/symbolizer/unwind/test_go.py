"""Unwind rules of Go programs."""

import pytest

from symbolizer.unwind.rules import CfaKind
from tests.support.elf_files import build_go, read_symbols
from tests.support.unwind_tables import read_unwind_table, rule_at

GO = """
package main
import ("fmt"; "os")
//go:noinline
func leaf(a, b int) int { return a*7 + b }
//go:noinline
func framed(a int) int { var x [64]int; for i := range x { x[i] = leaf(a, i) }; return x[a&63] }
func main() { fmt.Println(framed(len(os.Args))) }
"""


@pytest.fixture(scope="module", params=[True, False], ids=["stripped", "whole"])
def go_program(request, tmp_path_factory):
    """Return a program, and its symbols by name even if they are stripped."""
    folder = tmp_path_factory.mktemp("go")
    with_names = build_go(folder / "with_names", GO)
    symbols = {symbol.name: symbol for symbol in read_symbols(with_names)}
    return build_go(folder / "program", GO, is_stripped=request.param), symbols


def test_go_is_unwound_by_frame_pointer_except_without_a_frame(go_program):
    """In a leaf, and at the start of any function, the return address is at rsp."""
    path, symbols = go_program
    table = read_unwind_table(path)

    leaf, framed = symbols[b"main.leaf"], symbols[b"main.framed"]

    assert rule_at(table, leaf.address) == (CfaKind.RSP, 1, 0, 0)
    assert rule_at(table, leaf.address + leaf.size - 1) == (CfaKind.RSP, 1, 0, 0)
    assert rule_at(table, framed.address) == (CfaKind.RSP, 1, 0, 0)
    assert rule_at(table, framed.address + framed.size // 2)[0] == CfaKind.FRAME_POINTER


@pytest.mark.parametrize(
    "name", [b"runtime.goexit.abi0", b"runtime.mstart.abi0", b"runtime.rt0_go.abi0"]
)
def test_go_stacks_stop_at_their_first_function(go_program, name):
    """The first function of a goroutine, of a thread and of the program."""
    path, symbols = go_program
    if name not in symbols:
        name = name.removesuffix(b".abi0")

    symbol = symbols[name]

    assert rule_at(read_unwind_table(path), symbol.address + symbol.size - 1) == (
        CfaKind.STOP,
        0,
        0,
        0,
    )


@pytest.mark.parametrize("name", [b"runtime.mcall", b"runtime.morestack"])
def test_go_stacks_stop_where_the_threads_own_stack_is_taken(go_program, name):
    """Before that instruction, the goroutine's stack is unwound."""
    path, symbols = go_program
    symbol = symbols.get(name) or symbols[name + b".abi0"]
    table = read_unwind_table(path)

    assert rule_at(table, symbol.address)[0] != CfaKind.STOP
    assert rule_at(table, symbol.address + symbol.size - 1) == (CfaKind.STOP, 0, 0, 0)


def test_go_functions_that_switch_stacks_are_unwound_by_frame_pointer(go_program):
    """The table does not say what the stack pointer was before; once there is a frame, the caller
    may be anywhere."""
    path, symbols = go_program
    symbol = next(symbols[n] for n in symbols if n.startswith(b"runtime.systemstack.abi0"))
    table = read_unwind_table(path)

    kinds = [rule_at(table, symbol.address + n)[0] for n in (0, 3, 4, symbol.size - 1)]

    assert kinds == [CfaKind.FRAME_POINTER] * 2 + [CfaKind.OTHER_STACK] * 2


def test_go_signal_handlers_are_unwound(go_program):
    """The handler's frame is below the kernel's signal frame."""
    path, symbols = go_program
    table = read_unwind_table(path)
    names = {name.removesuffix(b".abi0"): symbol for name, symbol in symbols.items()}

    handler, ret = names[b"runtime.sigtramp"], names[b"runtime.sigreturn__sigaction"]

    assert rule_at(table, ret.address) == (CfaKind.SIGNAL, 0, 0, 0)
    rules = [rule_at(table, handler.address + n) for n in range(0, handler.size, 4)]
    assert {kind for kind, *_ in rules} == {CfaKind.RSP}
    assert rules[0] == (CfaKind.RSP, 1, 0, 0)
    assert max(operand for _, operand, *_ in rules) > 1
