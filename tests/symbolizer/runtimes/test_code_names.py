"""What the names of runtimes say."""

import time

import hypothesis.strategies as st
import pytest
from hypothesis import given

from symbolizer.location import Kind, NamedLocation
from symbolizer.runtimes.code_names import CodeName, location_of, split_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Node 24 --perf-basic-prof
        (b"JS:*inner /srv/spin.js:2:15", CodeName("inner", "/srv/spin.js", 2)),
        (b"JS:^get size /srv/spin.js:1:21", CodeName("get size", "/srv/spin.js", 1)),
        (b"JS:+'arrow /srv/spin.js:3:15", CodeName("arrow", "/srv/spin.js", 3)),
        (b"JS:* /srv/spin.js:4:114", CodeName("(anonymous)", "/srv/spin.js", 4)),
        (b"Eval:~ /srv/spin.js:1:1", CodeName("(anonymous)", "/srv/spin.js", 1)),
        (b"Function:~run node:internal/a:9:1", CodeName("run", "node:internal/a", 9)),
        (b"JS:*named :1:16", CodeName("named", "<anonymous>", 1)),
        (b"JS:+' :1:20", CodeName("(anonymous)", "<anonymous>", 1)),
        (b"JS:~x:1:2 /srv/odd.js:4:107", CodeName("x:1:2", "/srv/odd.js", 4)),
        (b"JS:leaf-0-turbofan", CodeName("leaf")),
        (b"JS:a-1-liftoff-12-liftoff", CodeName("a-1-liftoff")),
        (b"RegExp.> src: 'a+(b|c)*d' flags: 'gi'", CodeName("RegExp /a+(b|c)*d/")),
        # Deno 2.9
        (b"JS:o*leaf file:///srv/a.js:1:17", CodeName("leaf", "/srv/a.js", 1)),
        (b"JS:o+leaf file:///srv/a.js:1:17", CodeName("leaf", "/srv/a.js", 1)),
        (b"JS:^Safe ext:core/a.js:9:18", CodeName("Safe", "ext:core/a.js", 9)),
        # older versions
        (b"LazyCompile:*foo /srv/a.js:12:3", CodeName("foo", "/srv/a.js", 12)),
        (b"LazyCompile:~ file:///srv/a.mjs:1:2", CodeName("(anonymous)", "/srv/a.mjs", 1)),
        (b"JS:*foo /my files/a.js:12:3", CodeName("foo", "/my files/a.js", 12)),
        (b"JS:*foo evalmachine.<anonymous>:1:2", CodeName("foo", "evalmachine.<anonymous>", 1)),
        (b"RegExp:a+(b|c)*d", CodeName("RegExp /a+(b|c)*d/")),
        (b"Builtin:ArrayMap", CodeName("Builtin:ArrayMap")),
        (b"Stub:js-to-wasm:i:i", CodeName("Stub:js-to-wasm:i:i")),
        (b"JS:*foo", CodeName("JS:*foo")),
        (b"JS:*foo a.js:x:2", CodeName("JS:*foo a.js:x:2")),
        # Bun 1.4
        (b"JSC-FTL: leaf#A2fGtS", CodeName("leaf")),
        (b"JSC-Baseline: #ARfjO7", CodeName("(anonymous)#ARfjO7")),
        (b"JSC-YarrJIT: /a+(b|c)*d/", CodeName("RegExp /a+(b|c)*d/")),
        (b"JSC-Thunk: charAt", CodeName("JSC-Thunk: charAt")),
        # Python 3.12 -X perf
        (b"py::Box.<lambda>:/srv/a.py", CodeName("Box.<lambda>", "/srv/a.py", kind=Kind.PYTHON)),
        (b"py::f:<frozen abc>", CodeName("f", "<frozen abc>", kind=Kind.PYTHON)),
        (b"py::f", CodeName("py::f")),
        # JDK 17 and 25
        (b"int Main.leaf(int)", CodeName("Main.leaf(int)")),
        (
            b"java.util.List[] app.Box$In.f(int, java.util.List)",
            CodeName("app.Box$In.f(int, java.util.List)"),
        ),
        (
            b"int app.Hot$$Lambda$14/0x00007f468c000c20.applyAsInt(int)",
            CodeName("app.Hot$$Lambda.applyAsInt(int)"),
        ),
        (
            b"int app.Hot$$Lambda/0x0000000018040430.applyAsInt(int)",
            CodeName("app.Hot$$Lambda.applyAsInt(int)"),
        ),
        (
            b"long java.lang.invoke.LambdaForm$MH/0x00007f468c002000.invoke(int)",
            CodeName("java.lang.invoke.LambdaForm$MH.invoke(int)"),
        ),
        (b"I2C/C2I adapters", CodeName("I2C/C2I adapters")),
        (b"C1 Runtime new_instance_blob", CodeName("C1 Runtime new_instance_blob")),
        # perf-map-agent, and libperf-jvmti of perf
        (b"Lapp/Hot$Box;::leaf", CodeName("app.Hot$Box.leaf")),
        (
            b"Lapp/Hot;leaf(I[[JLjava/util/List;)V",
            CodeName("app.Hot.leaf(int, long[][], java.util.List)"),
        ),
        # .NET
        (b"void [App] App::Run(int32)[Tier1]", CodeName("App.Run(int32)")),
        (
            b"instance int32 [App] App.Box`1[System.Int32]::Leaf(int32,string)[OptimizedTier1]",
            CodeName("App.Box`1[System.Int32].Leaf(int32, string)"),
        ),
        (
            b"class [System.Runtime]System.String[] [App] App.P+<>c::.ctor(int32)[PreJIT]",
            CodeName("App.P+<>c..ctor(int32)"),
        ),
        (
            b"stub<397> AllocateTemporaryEntryPoints<PRECODE_FIXUP>",
            CodeName("stub AllocateTemporaryEntryPoints"),
        ),
        # Mono 6.8 --jitmap
        (b"App.Box`1<int>:Leaf (int,string)", CodeName("App.Box`1<int>.Leaf(int, string)")),
        (
            b"(wrapper alloc) object:Alloc (intptr)",
            CodeName("(wrapper alloc) object:Alloc (intptr)"),
        ),
        # Erlang/OTP 27 +JPperf true
        (b"$hot:leaf/2", CodeName("hot:leaf/2")),
        (b"$hot:leaf/2-CodeInfoPrologue", CodeName("hot:leaf/2")),
        (b"$lists:'-f/2-lc$^0/1-1-'/2", CodeName("lists:'-f/2-lc$^0/1-1-'/2")),
        (b"$'Elixir.App.Box':size/1", CodeName("App.Box.size/1")),
        (b"hot:leaf/2", CodeName("hot:leaf/2")),
        (b"erts_beamasm:normal_exit/0-CodeInfoPrologue", CodeName("erts_beamasm:normal_exit/0")),
        (b"'Elixir.App.Box':size/1", CodeName("App.Box.size/1")),
        (b"$global::dispatch_nif", CodeName("global::dispatch_nif")),
        # PHP 8.4 opcache.jit_debug=16
        (b"JIT$App\\Box::size", CodeName("App\\Box::size")),
        (b"JIT$/srv/app.php", CodeName("{main}", "/srv/app.php")),
        (b"TRACE-2$App\\leaf$7", CodeName("App\\leaf", line=7)),
        (b"TRACE-7$/srv/app.php$9", CodeName("{main}", "/srv/app.php", line=9)),
        (b"JIT$$trace_exit", CodeName("JIT$$trace_exit")),
        # LuaJIT 2.1 with LUAJIT_USE_PERFTOOLS
        (b"TRACE_3::/srv/app.lua:12", CodeName("app.lua:12", "/srv/app.lua", line=12)),
        # Ruby 3.3 --yjit-perf
        (b"[JIT] Box#leaf", CodeName("Box#leaf")),
        # Wasmtime
        (b"wasm[0]::function[1]", CodeName("wasm[0]::function[1]")),
    ],
)
def test_names_are_split_as_their_runtimes_put_them(name: bytes, expected: CodeName):
    assert split_name(name) == expected


def test_a_python_function_is_one_in_all_views():
    assert location_of(b"py::Box.size:/srv/a.py") == NamedLocation(
        "Box.size", "[python]", Kind.PYTHON, "/srv/a.py", 0, 0
    )


def test_a_line_counts_if_it_is_in_the_function_s_own_file():
    """V8 gives lines of inlined functions, and dangling pointers for the files of others."""
    name = b"JS:*f file:///srv/a.mjs:3:1"

    places = [location_of(name, file, 7) for file in (b"file:///srv/a.mjs", b"\x7f\xac", b"")]

    assert [(place.file, place.first_line, place.line) for place in places] == [
        ("/srv/a.mjs", 3, 7),
        ("/srv/a.mjs", 3, 3),
        ("/srv/a.mjs", 3, 3),
    ]


def test_a_line_tells_the_file_where_the_name_does_not():
    assert location_of(b"Main.leaf", b"Main.java", 7)[3:] == ("Main.java", 0, 7)


@given(st.binary(max_size=3000))
def test_every_part_of_a_name_is_readable(name: bytes):
    function, _, _, file, *_ = location_of(b"JS:*" + name + b" /a\x1b.js:1:2")

    assert (function + file).isprintable()
    assert function


def test_no_name_takes_long():
    hostile = [
        *(b"JS:*" + b" a:1" * 2000, b"JS:*" + b":" * 8000, b"py::" + b":" * 8000),
        *(b"JS:" + b"a-1" * 3000, b"JSC-DFG: " + b"#aaaaaa" * 999 + b"-", b"a " + b"a." * 4000),
        *(b"La;a(" + b"[" * 8000 + b")V", b"La;a(" + b"La" * 4000 + b")V"),
        *(b"a" + b" [a] ::" * 999 + b"(", b"a" + b" [a] ::" * 50 + b"(" * 999 + b")" * 999 + b"["),
        *(b"a:" * 4000 + b" (", b"$'a'" * 2000 + b":" + b"/1" * 999 + b"-", b"$a:" + b"/1" * 999),
        *(
            b"JIT$a" + b"$1" * 4000,
            b"TRACE_1::" + b":1" * 4000 + b"-",
            b"RegExp.> src: '" + b"'" * 999,
        ),
        b"a A." + b"$$Lambda$1/0x0000000" * 400 + b"()",
    ]
    begun_s = time.thread_time()
    for name in hostile * 10:
        split_name(name)

    assert time.thread_time() - begun_s < 2  # some milliseconds where nothing else runs
