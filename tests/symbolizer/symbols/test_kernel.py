"""Kernel addresses: images independent of randomisation, names, and missing privilege."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from symbolizer.symbols.kernel import (
    KERNEL_NAME,
    Program,
    RunningKernel,
    parse_modules,
)

NOWHERE = np.zeros(0, np.uint64)
CORE = [
    (0xFFFFFFFF81000000, "T", "_stext"),
    (0xFFFFFFFF81000000, "T", "_text"),
    (0xFFFFFFFF81000000, "t", "first"),
    (0xFFFFFFFF81000FF0, "t", "__pfx_second"),
    (0xFFFFFFFF81001000, "T", "__second"),
    (0xFFFFFFFF81001000, "T", "second"),
    (0xFFFFFFFF81001800, "D", "not_code"),
    (0xFFFFFFFF81002000, "T", "_etext"),
    (0xFFFFFFFF83000000, "T", "boot_only"),
]
MODULES = "disk 20480 1 - Live 0xffffffffc0200000\nnet 4096 0 - Live 0xffffffffc0300000 (E)\n"
IN_MODULES = [
    (0xFFFFFFFFC0200010, "t", "read_block\t[disk]"),
    (0xFFFFFFFFC0300000, "t", "send\t[net]"),
    (0xFFFFFFFFC0280000, "t", "bpf_prog_6deef7357e7b4530\t[bpf]"),
    (0xFFFFFFFFC0380000, "t", "bpf_prog_0123456789abcdef_mine\t[bpf]"),
]


def write_kernel(folder, slide=0, symbols=(*CORE, *IN_MODULES)):
    folder.mkdir()
    lines = [f"{address + slide:016x} {kind} {name}\n" for address, kind, name in symbols]
    (folder / "kallsyms").write_text("".join(lines))
    (folder / "modules").write_text(MODULES)
    note = np.array([4, 20, 3], dtype="<u4").tobytes() + b"GNU\0" + bytes(range(20))
    (folder / "kernel").mkdir()
    (folder / "kernel/notes").write_bytes(note)
    notes = folder / "module/disk/notes"
    notes.mkdir(parents=True)
    (notes / ".note.gnu.build-id").write_bytes(note[:16] + bytes(20))
    return folder


def read(folder):
    kept = {}

    def keep(image, functions, strings):
        names = [strings[n : strings.index(b"\0", n)].decode() for n in functions.names.tolist()]
        kept[image.name] = dict(zip(functions.starts.tolist(), names, strict=True))

    paths = folder / "kallsyms", folder / "modules", folder
    kernel, _ = RunningKernel(keep, time.monotonic_ns, *paths).find(NOWHERE)
    return kernel, kept


def test_functions_of_images_are_read(tmp_path):
    """They count from their image's start; the best name wins; padding is left out."""
    kernel, functions = read(write_kernel(tmp_path / "kernel"))

    assert functions == {
        KERNEL_NAME: {0: "first", 0x1000: "second"},
        "[disk]": {0x10: "read_block"},
        "[net]": {0: "send"},
    }
    assert {image.name: image.build_id for image in kernel.images if not image.program} == {
        KERNEL_NAME: bytes(range(20)).hex(),
        "[disk]": "00" * 20,
        "[net]": "[net]",
    }


def test_address_belongs_to_the_image_around_it(tmp_path):
    """BPF programs are between the modules, and end where a module begins."""
    kernel, _ = read(write_kernel(tmp_path / "kernel"))
    addresses = [0xFFFFFFFF81001234, 0xFFFFFFFFC0204FFF, 0xFFFFFFFFC0205000, 0xFFFFFFFFC0280004]
    addresses += [0xFFFFFFFFC0300FFF, 0xFFFFFFFF81002000, 0x1000]

    numbers = kernel.find(np.array(addresses, dtype=np.uint64)).tolist()

    images = [kernel.images[n] if n >= 0 else None for n in numbers]
    assert [image and (image.program or image.name) for image in images] == [
        *(KERNEL_NAME, "[disk]", None, "bpf_prog_6deef7357e7b4530", "[net]", None, None),
    ]


def test_address_randomisation_does_not_change_offsets(tmp_path):
    """Two boots of one kernel have the same image with the same offsets."""
    kernel, functions = read(write_kernel(tmp_path / "one", symbols=CORE))
    moved, moved_functions = read(write_kernel(tmp_path / "two", 0x1DE00000, symbols=CORE))

    assert functions == moved_functions
    assert kernel.images[0].build_id == moved.images[0].build_id
    assert moved.images[0].start - kernel.images[0].start == 0x1DE00000


def test_hidden_addresses_are_not_addresses(tmp_path):
    """Without privilege every address reads as zero, and nothing is named."""
    symbols = [(0, kind, name) for _, kind, name in (*CORE, *IN_MODULES)]
    folder = write_kernel(tmp_path / "kernel", symbols=symbols)
    (folder / "modules").write_text(MODULES.replace("ffffffffc0200000", "0" * 16))

    kernel, functions = read(folder)

    assert kernel.is_hidden
    assert KERNEL_NAME not in functions


def test_kernel_without_kallsyms_is_hidden(tmp_path):
    kernel, functions = read(tmp_path)

    assert kernel.is_hidden
    assert functions == {}


@pytest.mark.parametrize("text", [b"", b"\n", b"disk", b"disk x 1 - Live 0xzz\n", b"\xff\xfe 1\n"])
def test_unexpected_lines_of_modules_are_left_out(text):
    assert parse_modules(text) == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can lose its privilege")
def test_unprivileged_process_sees_no_kernel():
    """To a user who may not read the addresses they are hidden, not zero."""
    if Path("/proc/sys/kernel/kptr_restrict").read_text().strip() == "0":
        paranoid = Path("/proc/sys/kernel/perf_event_paranoid")
        if not paranoid.exists() or int(paranoid.read_text()) <= 1:
            pytest.skip("this kernel shows its addresses to everybody")
    child = os.fork()
    if child == 0:
        is_right = False
        try:
            os.setuid(65534)
            running = RunningKernel(lambda *_: None, time.monotonic_ns)
            is_right = running.find(NOWHERE)[0].is_hidden
        finally:
            os._exit(0 if is_right else 1)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class Running:
    """A kernel in files, and a clock."""

    def __init__(self, folder):
        self.now_ns = 1
        self.reading_takes_ns = 0
        self.folder = write_kernel(folder)
        files = (folder / "kallsyms", folder / "modules", folder)
        self.kernel = RunningKernel(lambda *_: None, self.clock_ns, *files)

    def clock_ns(self):
        self.now_ns += self.reading_takes_ns
        return self.now_ns

    def at(self, address):
        """Return the name of the image, or of the program, that holds an address."""
        kernel, (number,) = self.kernel.find(np.array([address], dtype=np.uint64))
        return "" if number < 0 else kernel.images[number].program or kernel.images[number].name


@pytest.fixture
def running(tmp_path):
    return Running(tmp_path / "kernel")


def test_programs_that_were_recorded_need_no_reading(running):
    """Also those that take the place of others, and those that were there from the start."""
    assert running.at(0xFFFFFFFFC0280010) == "bpf_prog_6deef7357e7b4530"

    running.kernel.add_programs([Program("bpf_prog_a", 0xFFFFFFFFC0500000, 100)])
    running.kernel.add_programs(
        [
            Program("bpf_prog_b", 0xFFFFFFFFC0280000, 64),
            Program("bpf_prog_c", 0xFFFFFFFFC0500000, 9),
        ]
    )
    running.now_ns += 10**12

    assert running.at(0xFFFFFFFFC0280010) == "bpf_prog_b"
    assert running.at(0xFFFFFFFFC0500008) == "bpf_prog_c"
    assert running.at(0xFFFFFFFF81001004) == KERNEL_NAME
    assert running.at(0xFFFFFFFFC0200020) == "[disk]"
    assert running.kernel.readings == 1


def test_symbols_can_be_read_in_pieces_before_they_are_used(running):
    """What is made meanwhile is known as well; nothing is read a second time."""
    lines = [f"{0xFFFFFFFF81001800 + i:016x} t f{i}\n" for i in range(1_000)] * 10
    with (running.folder / "kallsyms").open("a") as kallsyms:
        kallsyms.writelines(lines)
    running.reading_takes_ns = 30_000_000

    pieces = 1
    while not running.kernel.read():
        running.kernel.add_programs([Program("bpf_prog_a", 0xFFFFFFFFC0700000, 100)])
        pieces += 1

    assert pieces > 1
    assert running.at(0xFFFFFFFFC0700000) == "bpf_prog_a"
    assert running.at(0xFFFFFFFF81001004) == KERNEL_NAME
    assert running.kernel.readings == 1


def test_unknown_code_is_looked_for_less_and_less_often(running):
    unknown, seconds = 0xFFFFFFFFF0000000, []
    for second in range(1, 1_000):
        running.now_ns = second * 10**9
        before = running.kernel.readings
        assert running.at(unknown) == ""
        if running.kernel.readings > before:
            seconds.append(second)

    assert seconds == [1, 61, 181, 421, 901]


def test_a_module_that_was_loaded_is_read_in_pieces(running):
    """Meanwhile the map of before answers, with the programs that came since."""
    running.at(0xFFFFFFFF81001004)
    new = "more 4096 0 - Live 0xffffffffc0600000\n"
    (running.folder / "modules").write_text(MODULES + new)
    symbols = [*CORE, *IN_MODULES, (0xFFFFFFFFC0600000, "t", "later\t[more]")]
    lines = [f"{address:016x} {kind} {name}\n" for address, kind, name in symbols]
    lines += [f"{0xFFFFFFFF81001800 + i:016x} t f{i}\n" for i in range(1_000)] * 10
    (running.folder / "kallsyms").write_text("".join(lines))
    running.reading_takes_ns = 30_000_000
    answers = []
    for _ in range(20):
        answers.append(running.at(0xFFFFFFFFC0600000))
        running.kernel.add_programs([Program("bpf_prog_a", 0xFFFFFFFFC0700000, 100)])
        assert running.at(0xFFFFFFFF81001004) == KERNEL_NAME

    assert answers[:2] == ["", ""]
    assert answers[-1] == "[more]"
    assert running.at(0xFFFFFFFFC0700000) == "bpf_prog_a"
    assert running.kernel.readings == 2
