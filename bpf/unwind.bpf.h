/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The user stack of the current thread: registers, stack memory and tables in, tagged words out,
 * leaf first, with the reason it ended. A native frame is one word, the address to look up, so callers
 * are one byte before their return address. Its top byte is the tag (TAG_NATIVE is 0). That of an
 * interpreter's loop has a second word, its CFA: there belong frames of the interpreter's own stack
 * (chain.bpf.h).
 *
 * Each step finds the rule for an instruction in the tables and leaves a frame by it (frame.bpf.h).
 * Where there is no rule, because a runtime compiled the code or the table is not here yet, saved frame
 * pointers are followed for that step.
 *
 * What it takes from the file that includes it, because bcc knows maps only in the file that it
 * compiles (declared below):
 *
 *     lookup_process(pid, nth)                the process in the pid's nth place
 *     lookup_mapping(first, count, address)   the mapping of an address space at an address
 *     lookup_known_space(space)               this CPU's known rules of an address space
 *     lookup_table(executable)                an executable's table
 *     lookup_page(place), lookup_row(page, low, high)   a table's page, and the row in force there
 *     send_request(request)                   ask user space for what is missing
 *
 * and as -D constants: STOP_*, CFA_*, TABLE_*, GO_ON, FOUND, FRAMES_PER_PROGRAM, MAX_NATIVE_WORDS,
 * TAG_*, PAGE_BITS, BLOCK_BITS, KNOWN_FRAMES, PROCESS_PLACES, TASK_FLAGS, TASK_MM, MM_START_CODE.
 */
#ifndef EVERFLAME_UNWIND_BPF_H
#define EVERFLAME_UNWIND_BPF_H

#include "frame.bpf.h"

#define USER_CS_64 0x33 /* __USER_CS: 64-bit code */
#define NOT_A_SYSCALL (~0ULL) /* orig_ax outside of system calls */
#define SYSCALL_EXECVE 59
#define SYSCALL_EXECVEAT 322

static __always_inline struct process *lookup_process(u32 pid, u32 nth);
static __always_inline struct mapping *lookup_mapping(u32 first, u32 count, u64 address);
static __always_inline struct known_space *lookup_known_space(u32 space);
static __always_inline struct table *lookup_table(u32 executable);
static __always_inline struct page *lookup_page(u32 place);
static __always_inline struct row *lookup_row(const struct page *page, u32 low, u32 *high);
static __always_inline void send_request(struct request *request);

static __always_inline bool is_in_user_mode(struct bpf_perf_event_data *ctx)
{
	return ctx->regs.cs & 3;
}

/*
 * Registers of the thread when it was last in user mode. A tick inside the kernel finds them at
 * the top of the kernel stack. A system call's pc is that of the instruction after it, so it
 * counts as a return address; an interrupted one's is the instruction itself, as is a new program's.
 */
static __always_inline u64 read_user_registers(struct bpf_perf_event_data *ctx, void *task,
					       struct walk *walk)
{
	struct pt_regs saved;

	if (is_in_user_mode(ctx)) {
		saved = ctx->regs;
		walk->pc_is_return_address = false;
	} else {
		__builtin_memset(&saved, 0, sizeof(saved));
		read_kernel(&saved, sizeof(saved), (const void *)bpf_task_pt_regs(task));
		walk->pc_is_return_address = saved.orig_ax != NOT_A_SYSCALL &&
					     saved.orig_ax != SYSCALL_EXECVE &&
					     saved.orig_ax != SYSCALL_EXECVEAT;
	}
	walk->pc = saved.ip;
	walk->sp = saved.sp;
	walk->bp = saved.bp;
	walk->others[0] = saved.ax;
	walk->others[1] = saved.dx;
	walk->others[2] = saved.cx;
	walk->others[3] = saved.bx;
	walk->others[4] = saved.si;
	walk->others[5] = saved.di;
	walk->others[8] = saved.r8;
	walk->others[9] = saved.r9;
	walk->others[10] = saved.r10;
	walk->others[11] = saved.r11;
	walk->others[12] = saved.r12;
	walk->others[13] = saved.r13;
	walk->others[14] = saved.r14;
	walk->others[15] = saved.r15;
	walk->knows_others = true;
	walk->knows_rbx = true;
	walk->knows_bp = true;
	return saved.cs;
}

/* Ask once in a walk: for a table, or (0) for what the process has mapped by now. */
static __always_inline void request_once(struct walk *walk, u32 executable)
{
	struct request request = {
		.start_ns = walk->start_ns,
		.exec_id = walk->exec_id,
		.pid = walk->pid,
		.executable = executable,
	};

	if (walk->has_requested)
		return;
	walk->has_requested = true;
	send_request(&request);
}

/* Find out what code `address` is: FOUND, or why its frame pointer must do. */
static __always_inline u32 find_table(struct walk *walk, u64 address)
{
	struct mapping *mapping;
	struct table *table;

	if (address < walk->mapping.start || address >= walk->mapping.end) {
		walk->has_page = false;
		walk->mapping.end = 0;
		mapping = lookup_mapping(walk->first_mapping, walk->mappings, address);
		if (!mapping) {
			request_once(walk, 0);
			return STOP_NO_MAPPING;
		}
		walk->mapping = *mapping;
		walk->table.state = TABLE_NONE;
		table = lookup_table(walk->mapping.executable);
		if (table)
			walk->table = *table;
	}
	if (!walk->mapping.executable) /* memory without a file: a runtime compiled this code */
		return STOP_BAD_FRAME_POINTER;
	if (walk->table.state == TABLE_NONE)
		return STOP_NO_TABLE;
	if (walk->table.state == TABLE_NO_ROOM)
		return STOP_NO_ROOM;
	if (walk->table.state == TABLE_UNKNOWN) {
		request_once(walk, walk->mapping.executable);
		return STOP_NO_TABLE_YET;
	}
	return FOUND;
}

static __always_inline u32 find_page(struct walk *walk, u64 offset)
{
	u32 number = offset >> PAGE_BITS;
	struct page *page;

	if (walk->has_page && walk->page_number == number)
		return FOUND;
	walk->has_page = false;
	if (offset >> (32 + PAGE_BITS) || number - walk->table.low >= walk->table.count)
		return STOP_HOLE;
	page = lookup_page(walk->table.first + number - walk->table.low);
	if (!page || !page->count)
		return STOP_HOLE;
	walk->page = *page;
	walk->page_number = number;
	walk->has_page = true;
	return FOUND;
}

#define BLOCK_SIZE (1 << BLOCK_BITS)
#define GOLDEN_RATIO 0x9e3779b97f4a7c15ULL /* times 2^64: spreads neighbours */

/* A block's number has 41 bits, which leaves 23 to tell the last 8 million spaces apart. */
static __always_inline u64 key_of_block(u64 address, u32 space)
{
	return (u64)space << (47 - BLOCK_BITS) | address >> BLOCK_BITS;
}

/* Which of the known rules may be that for `address`. */
static __always_inline u8 place_of_block(u64 address)
{
	return (address >> BLOCK_BITS) * GOLDEN_RATIO >> 56;
}

/* Find the rule for `address`, and keep it for the next walk: FOUND, or why there is none. */
static __always_inline u32 find_rule(struct walk *walk, u64 address, struct known_rule *known)
{
	struct rule found = { .cfa_kind = CFA_FRAME_POINTER };
	u32 low = 0, high = BLOCK_SIZE;
	u32 in_page, block, end = 1 << PAGE_BITS;
	struct row *row;
	u64 offset;
	u32 why = find_table(walk, address);

	if (why == FOUND) {
		found.cfa_kind = CFA_HOLE;
		offset = address - walk->mapping.start + walk->mapping.file_offset;
		if (find_page(walk, offset) == FOUND) {
			in_page = offset & ((1 << PAGE_BITS) - 1);
			block = in_page & -BLOCK_SIZE;
			row = lookup_row(&walk->page, in_page, &end);
			if (row) {
				found = row->rule;
				low = row->pc_low > block ? row->pc_low - block : 0;
				high = end < block + BLOCK_SIZE ? end - block : BLOCK_SIZE;
			}
		}
	} else if (why != STOP_BAD_FRAME_POINTER) {
		return why;
	}
	known->key = key_of_block(address, walk->space);
	known->low = low;
	known->high = high;
	known->rule = found;
	return FOUND;
}

/* Leave one frame: GO_ON, or the reason why the stack ends here. */
static __always_inline u32 leave_frame(struct walk *walk, struct known_space *space, u64 address,
				       u32 depth)
{
	u32 within = address & (BLOCK_SIZE - 1);
	u8 place = place_of_block(address);
	struct known_rule *known;
	struct rule *rule;
	u32 why;

	walk->evaluates = false;
	if (unlikely(!walk->mappings))
		return leave_by_frame_pointer(walk, STOP_NO_PROCESS_YET);
	if (depth < KNOWN_FRAMES)
		space->last[depth] = place;
	known = &space->rules[place];
	if (known->key != key_of_block(address, walk->space) || within < known->low ||
	    within >= known->high) {
		why = find_rule(walk, address, known);
		if (unlikely(why != FOUND))
			return leave_by_frame_pointer(walk, why);
	}
	rule = &known->rule;
	walk->evaluates = rule->evaluates;
	if (likely(rule->cfa_kind == CFA_RSP || rule->cfa_kind == CFA_RBP))
		return leave_by_rule(walk, rule);
	return leave_by_rare_rule(walk, rule);
}

#define NATIVE_WORDS_MASK 255
_Static_assert(MAX_NATIVE_WORDS <= NATIVE_WORDS_MASK, "no bit of a length is cut off");

/* The frame that was left is of an interpreter's loop: say so, and where it lies. */
static __always_inline void push_cfa(struct walk *walk, struct user_stack *stack)
{
	u32 last = stack->length - 1;

	asm volatile("" : "+r"(last)); /* keeps the bound visible to the verifier */
	last &= NATIVE_WORDS_MASK;
	stack->words[last] |= (u64)TAG_EVALUATION << TAG_SHIFT;
	stack->words[last + 1] = walk->sp;
	stack->length = last + 2;
}

/* Leave up to FRAMES_PER_PROGRAM frames; GO_ON where there are more. */
static __always_inline u32 walk_on(struct walk *walk, struct user_stack *stack)
{
	struct known_space *space = lookup_known_space(walk->space);
	u32 stop = GO_ON;

	if (!space)
		return STOP_HOLE;
	for (u32 i = 0; i < FRAMES_PER_PROGRAM && stop == GO_ON; i++) {
		u64 address = walk->pc - walk->pc_is_return_address;
		u32 length = stack->length;

		asm volatile("" : "+r"(length)); /* keeps the bound visible to the verifier */
		if (length >= MAX_NATIVE_WORDS)
			return STOP_TRUNCATED;
		stack->words[length] = (u64)TAG_NATIVE << TAG_SHIFT | address;
		stop = leave_frame(walk, space, address, length);
		stack->length = length + 1;
		if (unlikely(walk->evaluates) && stop == GO_ON)
			push_cfa(walk, stack);
		asm volatile("" ::: "memory"); /* both paths look alike to the verifier again */
	}
	return stop;
}

/*
 * Load what the last walk needed, all at once: one after the other, as the walk comes to need them,
 * each would be a wait of its own.
 */
static __always_inline void warm_up(u32 space)
{
	struct known_space *known = lookup_known_space(space);

	if (!known)
		return;
	for (u32 i = 0; i < KNOWN_FRAMES / 2; i++)
		(void)*(volatile u64 *)&known->rules[known->last[i]].key;
}

/*
 * Take in the address space of the walk's process: false if it is that of an earlier program or of
 * an earlier process with this pid, or is being written. (x86 keeps loads in order.)
 */
static __always_inline bool copy_process(struct walk *walk, struct process *process)
{
	u64 version = *(volatile u64 *)&process->version;

	if (version & 1 || process->pid != walk->pid || process->start_ns != walk->start_ns ||
	    process->exec_id != walk->exec_id)
		return false;
	walk->space = process->space;
	walk->first_mapping = process->first;
	walk->mappings = process->count;
	walk->runtime = process->runtime;
	asm volatile("" ::: "memory");
	if (*(volatile u64 *)&process->version == version)
		return true;
	walk->mappings = 0;
	walk->runtime.interpreter = 0;
	return false;
}

/* Which address space the current process has, if user space has seen the program it runs now. */
static __always_inline void find_process(struct walk *walk, const struct count_key *key)
{
	struct process *process = NULL;

	walk->pid = key->pid;
	walk->start_ns = key->start_ns;
	walk->exec_id = key->exec_id;
	walk->has_page = false;
	walk->mapping.end = 0;
	walk->mappings = 0;
	walk->runtime.interpreter = 0;
	for (u32 i = 0; i < PROCESS_PLACES; i++) {
		process = lookup_process(key->pid, i);
		if (process && process->pid == key->pid)
			break;
	}
	if (process && copy_process(walk, process))
		warm_up(walk->space);
	else
		request_once(walk, 0);
}

/*
 * Whether the registers are of another program than the memory: until all of a new one is loaded, the
 * thread's are those with which the old one called execve, and the process may be known by the old one.
 * load_elf_binary fills in start_code right before it sets them.
 */
static __always_inline bool is_being_loaded(struct bpf_perf_event_data *ctx, void *task,
					    const struct walk *walk)
{
	return !is_in_user_mode(ctx) && !walk->pc_is_return_address &&
	       !kernel_u64(MEMBER(task, TASK_MM, u64) + MM_START_CODE);
}

/* Begin the walk of the current thread: GO_ON, or why it has no user stack. */
static __always_inline u32 begin_walk(struct bpf_perf_event_data *ctx, void *task,
				      const struct count_key *key, struct walk *walk,
				      struct user_stack *stack)
{
	u32 flags = MEMBER(task, TASK_FLAGS, u32);
	u64 cs;

	stack->length = 0;
	walk->has_requested = false;
	if (flags & PF_KTHREAD)
		return STOP_KERNEL_THREAD;
	if (!MEMBER(task, TASK_MM, u64)) /* an exiting thread leaves its memory early */
		return flags & PF_EXITING ? STOP_NO_PROGRAM : STOP_NO_USER_REGISTERS;
	cs = read_user_registers(ctx, task, walk);
	if (is_being_loaded(ctx, task, walk))
		return STOP_NO_PROGRAM;
	if (!is_user_code(walk->pc))
		return STOP_NO_USER_REGISTERS;
	if (cs != USER_CS_64) {
		stack->words[0] = walk->pc - walk->pc_is_return_address;
		stack->length = 1;
		return STOP_COMPAT;
	}
	find_process(walk, key);
	return GO_ON;
}

#endif
