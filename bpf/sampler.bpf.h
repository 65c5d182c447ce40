/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Records shared with user space (samples.py has their layout, the compiler asserts the sizes), and the
 * reading of kernel memory. Offsets into kernel structs come from the running kernel's BTF as -D.
 */
#ifndef EVERFLAME_SAMPLER_BPF_H
#define EVERFLAME_SAMPLER_BPF_H

#include <uapi/linux/bpf.h>
#include <linux/types.h>

#define __always_inline inline __attribute__((always_inline)) /* the programs have no calls */

#define COMM_SIZE 16
#define PF_EXITING 0x00000004 /* include/linux/sched.h */
#define PF_KTHREAD 0x00200000

struct count_key {
	u64 start_ns;
	u64 user_stack;
	u64 kernel_stack;
	u64 cgroup_id;
	u32 pid;
	u32 tid;
	u64 exec_id;
	char comm[COMM_SIZE];
};
_Static_assert(sizeof(struct count_key) == COUNT_KEY_SIZE, "samples.py: COUNT_KEY");

struct user_stack {
	u32 length;
	u32 stop;
	u64 words[MAX_USER_WORDS];
};
_Static_assert(sizeof(struct user_stack) == USER_STACK_SIZE, "samples.py: USER_STACK");

/* As much of it as nearly all stacks need that do not stand with their count. */
struct long_stack {
	u32 length;
	u32 stop;
	u64 words[MAX_LONG_WORDS];
};
_Static_assert(sizeof(struct long_stack) == LONG_STACK_SIZE, "samples.py: LONG_STACK");

/*
 * Most user stacks are short, and most that are seen in a second are seen once: such a stack stands
 * with its count. A longer one stands in a map of its own; here is its beginning.
 */
struct count {
	u64 samples;
	u64 first_ns;
	u64 last_ns;
	char leader_comm[COMM_SIZE];
	u32 length;
	u32 stop;
	u64 words[MAX_SHORT_WORDS];
};
_Static_assert(sizeof(struct count) == COUNT_SIZE, "samples.py: COUNT");

struct kernel_stack {
	u32 length;
	u32 stop; /* 0: it is whole */
	u64 words[MAX_KERNEL_WORDS];
};
_Static_assert(sizeof(struct kernel_stack) == KERNEL_STACK_SIZE, "samples.py: KERNEL_STACK");
_Static_assert(KERNEL_STACK_BYTES <= MAX_KERNEL_WORDS * sizeof(u64), "room for the kernel's stack");

/*
 * A tick whose walk needed what user space has not loaded yet: all that a later walk needs. The stack
 * from `start` on follows, `size` bytes, and then the words that were found at the tick.
 */
struct copy {
	struct count_key key; /* user_stack is 0 */
	u64 first_ns;
	u64 registers[16]; /* by DWARF number; the thread's own, when it was last in user mode */
	u64 pc;
	u64 start;
	char leader_comm[COMM_SIZE];
	u32 size;
	u32 unreadable; /* a bit for each page of memory, the lowest first */
	u32 length;
	u32 stop;
	u8 generation;
	u8 pc_is_return_address;
	u8 is_cut; /* there may be more of the stack */
	u8 unused[5];
};
_Static_assert(sizeof(struct copy) == COPY_SIZE, "samples.py: COPY");

struct counters {
	u64 values[COUNTERS];
};

/* What is seldom done stands apart in the code, which is as cold as the data when a tick comes. */
#define likely(condition) __builtin_expect(!!(condition), 1)
#define unlikely(condition) __builtin_expect(!!(condition), 0)

/*
 * bcc turns probe_read_user into the pre-5.5 helper when kallsyms hides its name, and that helper
 * reads whichever address space it likes. Declared here, they stay what they are.
 */
static long (*read_user)(void *to, u32 size, const void *from) = (void *)112;
static long (*read_kernel)(void *to, u32 size, const void *from) = (void *)113;

/* A member of a struct that the verifier knows the type of: a plain load. */
#define MEMBER(struct_at, offset, type) (*(const type *)((const char *)(struct_at) + (offset)))

static __always_inline u64 kernel_u64(u64 address)
{
	u64 value = 0;

	read_kernel(&value, sizeof(value), (const void *)address);
	return value;
}

static __always_inline u32 kernel_u32(u64 address)
{
	u32 value = 0;

	read_kernel(&value, sizeof(value), (const void *)address);
	return value;
}

/* One step of a 64-bit hash (the mixing of MurmurHash3's body); collisions are not expected. */
static __always_inline u64 mix(u64 hash, u64 word)
{
	word *= 0x87c37b91114253d5ULL;
	word = (word << 31) | (word >> 33);
	hash ^= word * 0x4cf5ad432745937fULL;
	hash = (hash << 27) | (hash >> 37);
	return hash * 5 + 0x52dce729;
}

#endif
