/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What user space loads for the walk: which code lies where in a process, and how to leave it.
 *
 *     processes   by pid: the address space of the program it runs now, a range of `mappings`
 *     mappings    sorted by address: which executable is there, and from where in its file
 *     executables executable -> its table, if it is here: a range of `pages`
 *     pages       for each page of 4 KiB of the file: where its rows are
 *     shards      rows, 8 bytes each: from this address on, the caller's frame is found like this
 *
 * What a walk reads was last read some milliseconds ago, so that each cache line is a wait for memory:
 * ranges are bisected in arrays whose neighbours share lines, pages are small, and the rules of most
 * frames are known from the walk before, which also shows what to load all at once.
 *
 * Layouts are those of tables.py, which the compiler asserts by size. The maps themselves, and how they
 * are asked, stand in sampler.bpf.c: bcc knows maps only in the file that it compiles.
 */
#ifndef EVERFLAME_TABLES_BPF_H
#define EVERFLAME_TABLES_BPF_H

#include "sampler.bpf.h"

/* The interpreter that a process has, by its number (0: none), and where its file is loaded. */
struct runtime {
	u64 bias; /* what its addresses are higher than as linked */
	u32 interpreter;
	u32 unused;
};

/*
 * User space writes these through shared memory. A process has one of PROCESS_PLACES places that its
 * pid selects; a hash table of the kernel's would be three more waits for memory.
 */
struct process {
	u64 version; /* odd while it is being written */
	u64 start_ns;
	u64 exec_id;
	u32 pid;
	u32 space; /* a number that no other address space has had */
	u32 first;
	u32 count;
	struct runtime runtime;
	u64 unused; /* a line of memory each */
};
_Static_assert(sizeof(struct process) == PROCESS_SIZE, "tables.py: PROCESS");

struct mapping {
	u64 start;
	u64 end;
	u64 file_offset;
	u32 executable; /* 0: memory without a file */
	u32 unused;
};
_Static_assert(sizeof(struct mapping) == MAPPING_SIZE, "tables.py: MAPPING");

struct table {
	u32 state;
	u32 low; /* the first page of the file that has rows */
	u32 count;
	u32 first; /* its place in `pages` */
};
_Static_assert(sizeof(struct table) == TABLE_SIZE, "tables.py: TABLE");

struct page {
	u32 first; /* counted through all shards */
	u16 count;
	u16 unused;
};
_Static_assert(sizeof(struct page) == PAGE_SIZE_IN_MAP, "tables.py: PAGE");

/* How a frame is left. */
struct rule {
	u16 cfa; /* in words of 8 bytes */
	u8 cfa_kind : 7;
	u8 evaluates : 1; /* it is in CPython's evaluation loop */
	u8 rbp_kind : 3;
	u8 rbx : 5; /* where it is: RBX_UNKNOWN, RBX_SAME, or so many words below the CFA */
	s16 rbp; /* in words of 8 bytes */
};

_Static_assert(EVALUATES == 1 << 7, "tables.py: the bit above the kind");

struct row {
	u16 pc_low; /* of the first instruction it holds for, within its page */
	struct rule rule;
};
_Static_assert(sizeof(struct row) == ROW_SIZE, "tables.py: ROW");

/*
 * A rule that a walk on this CPU has found for some instructions of a block of code. An address in an
 * address space never gets another rule, so what is here is right for as long as it is here.
 */
struct known_rule {
	u64 key; /* see key_of_block() */
	u8 low; /* the bytes of the block that it holds for: [low, high) */
	u8 high;
	struct rule rule;
};

/* The known rules of an address space: their places by block, and those that its last walk needed. */
struct known_space {
	u8 last[KNOWN_FRAMES];
	struct known_rule rules[KNOWN_RULES];
};
_Static_assert(sizeof(struct known_space) == KNOWN_SPACE_SIZE, "tables.py: KNOWN_SPACE_SIZE");
_Static_assert(KNOWN_RULES == 256, "a place in `last` is a byte");

/* A program that user space knows, by its file: the runtime of processes that it does not know yet. */
struct program_key {
	u64 inode;
	u32 device;
	u32 unused;
};

struct program {
	u64 start_code; /* mm->start_code, if it is loaded where it is linked */
	u64 debug; /* of its struct r_debug, where the address is; 0: it has the interpreter in itself */
	u64 dynamic; /* the dynamic section of the library with the interpreter */
	u32 interpreter;
	u32 unused;
};
_Static_assert(sizeof(struct program) == PROGRAM_SIZE, "interpreters.py: PROGRAM");

struct request {
	u64 start_ns;
	u64 exec_id;
	u32 pid;
	u32 executable; /* 0: the process itself is not known */
};
_Static_assert(sizeof(struct request) == REQUEST_SIZE, "tables.py: REQUEST");

#endif
