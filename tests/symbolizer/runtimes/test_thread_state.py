"""Where a thread's state is, decoded from functions that return it, as compilers write them."""

import shutil
import subprocess
from pathlib import Path

import pytest

from symbolizer.runtimes.cpython import Refusal, StateKind
from tests.support.python_images import Process, image_of, imitation, known_image_of

MAIN = """
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>
void set_state(void *);
static void *begin(void *state)
{
  set_state(state);
  printf("%p %p\\n", (void *)pthread_self(), state);
  fflush(stdout);
  pause();
  return 0;
}
int main(int count, char **arguments)
{
  pthread_t thread;
  pthread_create(&thread, 0, begin, arguments);
  pause();
  return count;
}
"""


def model(name: str) -> str:
    return f'__attribute__((tls_model("{name}"), visibility("hidden")))'


PROGRAMS = {
    "local": ("static", "-no-pie"),
    "local, position independent": ("static", "-pie -fPIE"),
    "local, frame pointers": ("static", "-fno-omit-frame-pointer -fcf-protection"),
    "general, relaxed": (model("global-dynamic"), "-fPIC -no-pie"),
    "general, without PLT, relaxed": (model("global-dynamic"), "-fPIC -no-pie -fno-plt"),
    "local dynamic, relaxed": (model("local-dynamic"), "-fPIC -no-pie"),
    "initial, relaxed": (model("initial-exec"), "-fPIC -no-pie"),
    "descriptor, relaxed": (model("global-dynamic"), "-fPIC -no-pie -mtls-dialect=gnu2"),
}
LIBRARIES = {
    "general": (model("global-dynamic"), "", StateKind.DYNAMIC_TLS),
    "general, without PLT": (model("global-dynamic"), "-fno-plt", StateKind.DYNAMIC_TLS),
    "local": (model("local-dynamic"), "", StateKind.DYNAMIC_TLS),
    "local, without PLT": (model("local-dynamic"), "-fno-plt", StateKind.DYNAMIC_TLS),
    "local, frame pointers": (
        model("local-dynamic"),
        "-fno-omit-frame-pointer -fcf-protection",
        StateKind.DYNAMIC_TLS,
    ),
    "initial": (model("initial-exec"), "", StateKind.GOT_TLS),
    "descriptor": (model("global-dynamic"), "-mtls-dialect=gnu2", StateKind.GOT_TLS),
    "local descriptor": (model("local-dynamic"), "-mtls-dialect=gnu2", StateKind.GOT_TLS),
}


def compile_to(output: Path, *sources: str, flags: str, compiler: str = "gcc") -> Path:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    paths = []
    for number, source in enumerate(sources):
        paths.append(output.with_name(f"{output.name}{number}.c"))
        paths[-1].write_text(source)
    command = [compiler, "-O2", *paths, *flags.split(), "-pthread", "-o", output]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60, text=True)
    if "unknown argument" in done.stderr or "unsupported argument" in done.stderr:
        pytest.skip(f"{compiler} does not know {flags}")
    assert done.returncode == 0, done.stderr
    return output


def assert_reads_state(file: Path, program: Path) -> None:
    image, _ = known_image_of(file)
    with subprocess.Popen([program], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            thread_id, state = (int(each, 16) for each in child.stdout.readline().split())
            process = Process(child.pid, thread_id)
            read = process.thread_state(image, process.bias(file, image.code_shift))
        finally:
            child.kill()
    assert read == state


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("kind", PROGRAMS)
def test_in_a_program_it_is_at_a_distance_from_the_thread_pointer(kind, compiler, tmp_path):
    storage, flags = PROGRAMS[kind]
    program = compile_to(
        tmp_path / "program", imitation(storage), MAIN, flags=flags, compiler=compiler
    )

    assert known_image_of(program)[0].state_kind == StateKind.STATIC_TLS
    assert_reads_state(program, program)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("kind", LIBRARIES)
def test_in_a_library_it_is_found_by_the_global_offset_table(kind, compiler, tmp_path):
    storage, flags, state_kind = LIBRARIES[kind]
    library = compile_to(
        tmp_path / "library.so",
        imitation(storage),
        flags=f"-fPIC -shared {flags}",
        compiler=compiler,
    )
    program = compile_to(tmp_path / "program", MAIN, flags=f"{library} -Wl,-rpath,{tmp_path}")

    assert known_image_of(library)[0].state_kind == state_kind
    assert_reads_state(library, program)


def test_a_variable_that_another_file_may_define_is_refused(tmp_path):
    source = imitation('__attribute__((visibility("default")))')
    library = compile_to(tmp_path / "library.so", source, flags="-fPIC -shared")

    image = image_of(library)

    assert image is not None
    assert (image.refusal, image.layout) == (Refusal.NO_THREAD_STATE, None)


@pytest.mark.parametrize(
    "body",
    [
        "return state ? state : before;",
        "extern void *find(void); return find();",
        "return 0;",
        "return ((char *)state) + 8;",
        "return *(void **)state;",
    ],
)
def test_functions_that_do_more_are_refused(body, tmp_path):
    source = imitation().replace("{ return state; }", f"{{ {body} }}")
    library = compile_to(tmp_path / "library.so", source, flags="-fPIC -shared")

    image = image_of(library)

    assert image is not None
    assert image.refusal == Refusal.NO_THREAD_STATE


def test_blocks_of_another_c_library_are_not_known(tmp_path):
    """Only glibc has the blocks of modules where they are looked for."""
    library = compile_to(
        tmp_path / "library.so",
        imitation(model("global-dynamic")).replace("#include <stdio.h>", "int printf();"),
        flags="-fPIC -shared -nostdlib",
    )

    image = image_of(library)

    assert image is not None
    assert image.refusal == Refusal.UNSUPPORTED_LIBC
