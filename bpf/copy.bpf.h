/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The copying of registers and stack memory, for ticks that are unwound in user space later.
 *
 * A main thread's stack ends where it began (mm->start_stack), and that of another thread below its
 * thread-local memory, where the C library has put both into one mapping. So no more than what is used
 * is copied, and pages that were never touched, as in the middle of large buffers, are left out. Any
 * other stack is read up to the first page that cannot be read.
 */
#ifndef EVERFLAME_COPY_BPF_H
#define EVERFLAME_COPY_BPF_H

#include "unwind.bpf.h"

#define MEMORY_PAGE 4096
#define COPY_PAGES (COPY_BYTES / MEMORY_PAGE)
#define RED_ZONE 128 /* below the stack pointer, in use all the same (System V ABI, 3.2.2) */
#define WORDS_MASK 16383
_Static_assert(MAX_USER_WORDS * WORD <= WORDS_MASK, "no bit of a size is cut off");
_Static_assert(COPY_PAGES + 1 <= 32, "a bit for each page");

struct copying {
	u64 paid_ns; /* up to this moment the budget of this CPU is spent */
	struct copy copy;
	u8 content[COPY_BYTES + WORDS_MASK + 1];
};

/* A budget of bytes per second and CPU, of which COPY_BURST_NS may be saved up. */
static __always_inline bool may_copy(struct copying *to)
{
	u64 now = bpf_ktime_get_ns();

	to->copy.first_ns = now;
	if (now > COPY_BURST_NS && to->paid_ns < now - COPY_BURST_NS)
		to->paid_ns = now - COPY_BURST_NS;
	return to->paid_ns < now;
}

/* Return how many bytes from `start` on may be part of the stack; all that there is room for if unknown. */
static __always_inline u64 used_bytes(void *task, const struct count_key *key, u64 start)
{
	u64 end;

	if (key->tid == key->pid)
		end = kernel_u64(MEMBER(task, TASK_MM, u64) + MM_START_STACK) + WORD;
	else /* as it was when the thread last left the CPU: C libraries never change it */
		end = kernel_u64((u64)task + TASK_THREAD + THREAD_FSBASE) & ~7ULL;
	return end > start && end - start < COPY_BYTES ? end - start : COPY_BYTES;
}

/*
 * Read the next piece of the stack, up to the end of its page: false if that was the last one. What is
 * left from one piece to the next stands in memory, where the verifier tells no values apart.
 */
static __always_inline bool copy_piece(struct copying *to, u64 used, u32 page)
{
	volatile struct copy *copy = &to->copy;
	u32 offset = copy->size;
	u64 at = copy->start + offset;
	u32 piece = MEMORY_PAGE - (at & (MEMORY_PAGE - 1));

	if (offset >= used)
		return false;
	if (piece > used - offset)
		piece = used - offset;
	copy->size = offset + piece;
	asm volatile("" : "+r"(offset), "+r"(piece)); /* keeps the bounds visible to the verifier */
	offset &= COPY_BYTES - 1;
	piece &= 2 * MEMORY_PAGE - 1;
	if (!read_user(to->content + offset, piece, (const void *)at))
		return true;
	copy->unreadable |= 1U << page;
	return used < COPY_BYTES;
}

/* Fill in all but what the caller knows already; return the size of the record. */
static __always_inline u32 copy_user(struct bpf_perf_event_data *ctx, void *task,
				     struct copying *to, struct walk *walk,
				     const struct user_stack *user)
{
	struct copy *copy = &to->copy;
	u64 used, done, bytes;

	read_user_registers(ctx, task, walk);
	for (u32 i = 0; i < DWARF_REGISTERS; i++)
		copy->registers[i] = walk->others[i];
	copy->registers[6] = walk->bp;
	copy->registers[7] = walk->sp;
	copy->pc = walk->pc;
	copy->pc_is_return_address = walk->pc_is_return_address;
	copy->start = (walk->sp - RED_ZONE) & ~7ULL;
	copy->size = 0;
	copy->unreadable = 0;
	used = used_bytes(task, &copy->key, copy->start);
	for (u32 i = 0; i < COPY_PAGES; i++) {
		asm volatile("" : "+r"(i));
		if (!copy_piece(to, used, i))
			break;
	}
	copy->is_cut = used == COPY_BYTES && !copy->unreadable;
	copy->stop = user->stop;
	done = copy->size;
	bytes = user->length * WORD;
	asm volatile("" : "+r"(done), "+r"(bytes));
	done &= 2 * COPY_BYTES - 1; /* no more than COPY_BYTES; these lines are the verifier's */
	if (done > COPY_BYTES)
		done = COPY_BYTES;
	bytes &= WORDS_MASK;
	copy->length = bytes / WORD;
	read_kernel(to->content + done, bytes, user->words);
	to->paid_ns += (sizeof(*copy) + done + bytes) * COPY_NS_PER_BYTE;
	return sizeof(*copy) + done + bytes;
}

#endif
