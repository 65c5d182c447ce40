/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The user stack of the current thread: registers and stack memory in, tagged words out, leaf
 * first, with the reason it ended. A word is the address to look up, so callers are one byte
 * before their return address; its top byte is the tag, 0 for native code.
 */
#ifndef EVERFLAME_UNWIND_BPF_H
#define EVERFLAME_UNWIND_BPF_H

#include "sampler.bpf.h"

#define USER_ADDRESS_LIMIT 0x0000800000000000ULL /* the top byte stays free for the tag */
#define USER_CS_64 0x33 /* __USER_CS: 64-bit code */
#define NOT_A_SYSCALL (~0ULL) /* orig_ax outside of system calls */

struct user_registers {
	u64 pc;
	u64 sp;
	u64 bp;
	u64 cs;
	bool pc_is_return_address;
};

static __always_inline bool is_user_code(u64 address)
{
	return address >= 4096 && address < USER_ADDRESS_LIMIT;
}

/*
 * Registers of the thread when it was last in user mode. A tick inside the kernel finds them at
 * the top of the kernel stack. A system call's pc is that of the instruction after it, so it
 * counts as a return address; an interrupted one's is the instruction itself.
 */
static __always_inline void read_user_registers(struct bpf_perf_event_data *ctx, void *task,
						struct user_registers *user)
{
	struct pt_regs saved = {};

	if (ctx->regs.cs & 3) {
		user->pc = ctx->regs.ip;
		user->sp = ctx->regs.sp;
		user->bp = ctx->regs.bp;
		user->cs = ctx->regs.cs;
		user->pc_is_return_address = false;
		return;
	}
	read_kernel(&saved, sizeof(saved), (const void *)bpf_task_pt_regs(task));
	user->pc = saved.ip;
	user->sp = saved.sp;
	user->bp = saved.bp;
	user->cs = saved.cs;
	user->pc_is_return_address = saved.orig_ax != NOT_A_SYSCALL;
}

/*
 * Follow saved frame pointers: [bp] is the caller's, [bp + 8] the return address. Each step must
 * lead further up the stack, so the walk ends whatever the memory holds.
 */
static __always_inline void walk_frame_pointers(const struct user_registers *user,
						struct user_stack *stack)
{
	struct {
		u64 bp;
		u64 return_address;
	} frame;
	u64 bp = user->bp;
	u64 lowest = user->sp;

	stack->stop = STOP_TRUNCATED;
	for (u32 i = 1; i < MAX_USER_WORDS; i++) {
		asm volatile("" : "+r"(i)); /* keeps the bound visible to the verifier */
		if (bp == 0) {
			stack->stop = STOP_CHAIN_END;
			return;
		}
		if (bp < lowest || bp >= USER_ADDRESS_LIMIT || (bp & 7)) {
			stack->stop = STOP_BAD_FRAME_POINTER;
			return;
		}
		if (read_user(&frame, sizeof(frame), (const void *)bp)) {
			stack->stop = STOP_UNREADABLE;
			return;
		}
		/* A zero return address ends the stack as well: clone and some start codes do so. */
		if (frame.return_address == 0) {
			stack->stop = STOP_CHAIN_END;
			return;
		}
		if (!is_user_code(frame.return_address)) {
			stack->stop = STOP_BAD_FRAME_POINTER;
			return;
		}
		stack->words[i] = frame.return_address - 1;
		stack->length = i + 1;
		lowest = bp + sizeof(frame);
		bp = frame.bp;
	}
}

static __always_inline void unwind_user(struct bpf_perf_event_data *ctx, void *task,
					struct user_stack *stack)
{
	struct user_registers user = {};

	stack->length = 0;
	if (kernel_u32((u64)task + TASK_FLAGS) & PF_KTHREAD) {
		stack->stop = STOP_KERNEL_THREAD;
		return;
	}
	stack->stop = STOP_NO_USER_REGISTERS;
	if (!kernel_u64((u64)task + TASK_MM))
		return;
	read_user_registers(ctx, task, &user);
	if (!is_user_code(user.pc))
		return;
	stack->words[0] = user.pc - user.pc_is_return_address;
	stack->length = 1;
	if (user.cs != USER_CS_64) {
		stack->stop = STOP_COMPAT;
		return;
	}
	walk_frame_pointers(&user, stack);
}

#endif
