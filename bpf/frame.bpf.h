/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * How a walk leaves a frame, once the rule for it is known: registers and stack memory in, the caller's
 * registers out. No map is asked here.
 *
 * A rule is what the compiler wrote into .eh_frame for that very instruction (DWARF 5, 6.4): how the
 * canonical frame address (CFA) is computed, and where the caller's registers are saved. Without one
 * the saved frame pointer is followed, which is checked. symbolizer/unwind/walk.py takes the same steps
 * for copied stacks.
 *
 * Each step returns GO_ON, or the reason why the stack ends there. -D constants: STOP_*, CFA_*, RBP_*,
 * RBX_*, GO_ON.
 */
#ifndef EVERFLAME_FRAME_BPF_H
#define EVERFLAME_FRAME_BPF_H

#include "sampler.bpf.h"
#include "tables.bpf.h"

#define USER_ADDRESS_LIMIT 0x0000800000000000ULL /* the top byte stays free for the tag */
#define WORD 8

#define DWARF_REGISTERS 16
#define DWARF_RBX 3

/* struct rt_sigframe at rsp when a handler has returned: ucontext, whose registers begin at 40. */
#define SIGNAL_REGISTERS_OFFSET 40
enum { SIGNAL_R8 = 0, SIGNAL_RDI = 8, SIGNAL_RSI, SIGNAL_RBP, SIGNAL_RBX, SIGNAL_RDX, SIGNAL_RAX,
       SIGNAL_RCX, SIGNAL_RSP, SIGNAL_RIP, SIGNAL_REGISTERS };

struct walk {
	u64 pc;
	u64 sp;
	u64 bp;
	u64 others[DWARF_REGISTERS]; /* by DWARF number; bp and sp are above */
	u64 start_ns;
	u64 exec_id;
	u32 pid;
	u32 space;
	u32 first_mapping;
	u32 mappings; /* how many; 0: its address space is not known yet */
	u8 pc_is_return_address;
	u8 knows_others;
	u8 knows_rbx; /* of the others; all of them where knows_others */
	u8 knows_bp;
	u8 has_page;
	u8 has_requested;
	u8 evaluates; /* the frame that was left last is of an interpreter's loop */
	struct mapping mapping; /* that of the last step; most frames have a neighbour in it */
	struct table table; /* of that mapping */
	struct page page; /* and the last page of it */
	u32 page_number;
	struct runtime runtime;
};

static __always_inline bool is_user_code(u64 address)
{
	return address >= 4096 && address < USER_ADDRESS_LIMIT;
}

/*
 * Leave a frame by its saved frame pointer: [bp] is the caller's, [bp + 8] the return address.
 * `why` says why there is no better way; it is the reason when this one fails.
 */
static __always_inline u32 leave_by_frame_pointer(struct walk *walk, u32 why)
{
	struct {
		u64 bp;
		u64 return_address;
	} frame;
	u64 bp = walk->bp;

	if (bp == 0)
		return why == STOP_BAD_FRAME_POINTER ? STOP_CHAIN_END : why;
	if (!walk->knows_bp || bp < walk->sp || bp >= USER_ADDRESS_LIMIT || (bp & 7))
		return why;
	if (read_user(&frame, sizeof(frame), (const void *)bp))
		return why == STOP_BAD_FRAME_POINTER ? STOP_UNREADABLE : why;
	/* A zero return address ends the stack as well: some start codes do so. */
	if (frame.return_address == 0)
		return why == STOP_BAD_FRAME_POINTER ? STOP_CHAIN_END : why;
	if (!is_user_code(frame.return_address))
		return why;
	walk->pc = frame.return_address;
	walk->sp = bp + sizeof(frame);
	walk->bp = frame.bp;
	walk->pc_is_return_address = true;
	walk->knows_others = false;
	walk->knows_rbx = false;
	return GO_ON;
}

/* The kernel put all registers of the interrupted code on the stack for the handler's return. */
static __always_inline u32 leave_signal_frame(struct walk *walk)
{
	u64 saved[SIGNAL_REGISTERS];

	if (read_user(&saved, sizeof(saved), (const void *)(walk->sp + SIGNAL_REGISTERS_OFFSET)))
		return STOP_UNREADABLE;
	if (!is_user_code(saved[SIGNAL_RIP]))
		return STOP_BAD_STACK_POINTER;
	for (u32 i = 0; i < 8; i++)
		walk->others[8 + i] = saved[SIGNAL_R8 + i];
	walk->others[0] = saved[SIGNAL_RAX];
	walk->others[1] = saved[SIGNAL_RDX];
	walk->others[2] = saved[SIGNAL_RCX];
	walk->others[3] = saved[SIGNAL_RBX];
	walk->others[4] = saved[SIGNAL_RSI];
	walk->others[5] = saved[SIGNAL_RDI];
	walk->pc = saved[SIGNAL_RIP];
	walk->sp = saved[SIGNAL_RSP];
	walk->bp = saved[SIGNAL_RBP];
	walk->pc_is_return_address = false;
	walk->knows_others = true;
	walk->knows_rbx = true;
	walk->knows_bp = true;
	return GO_ON;
}

/* A word that a DWARF expression reads: a register plus an offset, dereferenced. */
static __always_inline long read_word(u64 *to, u64 base, s64 words)
{
	return read_user(to, sizeof(*to), (const void *)(base + words * WORD));
}

/* The canonical frame address, from which all else is counted; 0 in `error` where it is known. */
static __always_inline u64 frame_address(struct walk *walk, const struct rule *rule, u32 *error)
{
	u64 cfa = 0;
	u32 number;

	*error = 0;
	switch (rule->cfa_kind) {
	case CFA_RSP:
		return walk->sp + (u64)rule->cfa * WORD;
	case CFA_RBP:
		if (!walk->knows_bp)
			*error = STOP_REGISTER_LOST;
		return walk->bp + (u64)rule->cfa * WORD;
	case CFA_CLONE:
		return walk->sp + WORD;
	case CFA_PLT: /* `cfa` is where in a stub of 16 bytes its push has been done */
	case CFA_PLT_LAZY:
		return walk->sp + WORD + ((walk->pc & 15) >= rule->cfa ? WORD : 0);
	case CFA_DEREF_RBP:
	case CFA_DEREF_RSP:
		if (rule->cfa_kind == CFA_DEREF_RBP && !walk->knows_bp)
			*error = STOP_REGISTER_LOST;
		else if (read_word(&cfa, rule->cfa_kind == CFA_DEREF_RBP ? walk->bp : walk->sp,
				   (s8)(rule->cfa & 0xff)))
			*error = STOP_UNREADABLE;
		return cfa + (u64)(rule->cfa >> 8) * WORD;
	}
	if (rule->cfa_kind < CFA_REGISTER) {
		*error = STOP_UNSUPPORTED_RULE;
		return 0;
	}
	if (!(rule->cfa_kind == CFA_REGISTER + DWARF_RBX ? walk->knows_rbx : walk->knows_others)) {
		*error = STOP_REGISTER_LOST;
		return 0;
	}
	number = rule->cfa_kind & (DWARF_REGISTERS - 1);
	asm volatile("" : "+r"(number)); /* keeps the bound visible to the verifier */
	number &= DWARF_REGISTERS - 1;
	return walk->others[number] + (u64)rule->cfa * WORD;
}

/* Restore the caller's rbx, of a rule that says where it is: false if it is not known all the same. */
static __always_inline bool restore_rbx(struct walk *walk, const struct rule *rule, u64 cfa)
{
	if (rule->rbx == RBX_SAME)
		return walk->knows_rbx;
	return !read_word(&walk->others[DWARF_RBX], cfa, -(s64)rule->rbx);
}

static __always_inline u32 leave_by_rule(struct walk *walk, const struct rule *rule)
{
	u64 saved[2]; /* where most functions keep them: rbp, return address */
	u32 error;
	u64 cfa = frame_address(walk, rule, &error);

	if (unlikely(error))
		return error;
	/* A caller's frame lies higher, so that the walk ends whatever the memory holds. */
	if (unlikely(cfa <= walk->sp || cfa >= USER_ADDRESS_LIMIT))
		return STOP_BAD_STACK_POINTER;
	if (unlikely(read_user(&saved, sizeof(saved), (const void *)(cfa - sizeof(saved)))))
		return STOP_UNREADABLE;
	if (likely(rule->rbp_kind == RBP_SAME)) {
		/* it is where it was */
	} else if (likely(rule->rbp_kind == RBP_AT_CFA)) {
		if (rule->rbp == -2)
			walk->bp = saved[0];
		else if (read_word(&walk->bp, cfa, rule->rbp))
			return STOP_UNREADABLE;
		walk->knows_bp = true;
	} else if (rule->rbp_kind == RBP_DEREF_RBP) {
		if (read_word(&walk->bp, walk->bp, rule->rbp))
			return STOP_UNREADABLE;
	} else if (rule->rbp_kind == RBP_DEREF_RSP) {
		if (read_word(&walk->bp, walk->sp, rule->rbp))
			return STOP_UNREADABLE;
		walk->knows_bp = true;
	} else {
		walk->knows_bp = false;
	}
	walk->knows_rbx = unlikely(rule->rbx != RBX_UNKNOWN) && restore_rbx(walk, rule, cfa);
	walk->sp = cfa;
	walk->pc = saved[1];
	walk->pc_is_return_address = true;
	walk->knows_others = false;
	if (walk->pc == 0)
		return STOP_CHAIN_END;
	return is_user_code(walk->pc) ? GO_ON : STOP_BAD_STACK_POINTER;
}

/* The return address is in a register, as it is while vfork() asks the kernel for a child. */
static __always_inline u32 leave_by_register(struct walk *walk, const struct rule *rule)
{
	u32 number = rule->cfa_kind & (DWARF_REGISTERS - 1);

	if (!walk->knows_others)
		return STOP_REGISTER_LOST;
	asm volatile("" : "+r"(number)); /* keeps the bound visible to the verifier */
	number &= DWARF_REGISTERS - 1;
	walk->pc = walk->others[number];
	walk->sp += (u64)rule->cfa * WORD;
	walk->pc_is_return_address = true;
	walk->knows_others = false;
	walk->knows_rbx = false;
	return is_user_code(walk->pc) ? GO_ON : STOP_BAD_STACK_POINTER;
}

/*
 * Leave a frame by a rule that is not one of the two that 99 of 100 have. A runtime whose frames need a
 * step of their own gets it here: a kind of rule that the table has for the runtime's code.
 */
static __always_inline u32 leave_by_rare_rule(struct walk *walk, const struct rule *rule)
{
	if (rule->cfa_kind == CFA_STOP)
		return STOP_ROOT;
	if (rule->cfa_kind == CFA_SIGNAL)
		return leave_signal_frame(walk);
	if (rule->cfa_kind == CFA_HOLE)
		return leave_by_frame_pointer(walk, STOP_HOLE);
	if (rule->cfa_kind == CFA_OTHER_STACK)
		walk->sp = 0; /* wherever the caller's frame is, it may be */
	if (rule->cfa_kind == CFA_FRAME_POINTER || rule->cfa_kind == CFA_OTHER_STACK)
		return leave_by_frame_pointer(walk, STOP_BAD_FRAME_POINTER);
	if (rule->cfa_kind == CFA_CLONE && walk->knows_others && walk->others[0] == 0)
		return STOP_ROOT; /* the thread that has just been made */
	if (rule->cfa_kind >= CFA_RETURN_REGISTER)
		return leave_by_register(walk, rule);
	return leave_by_rule(walk, rule);
}

#endif
