/*
 * The kernel's walk, compiled for user space: a test hands in rows and stacks, and compares the answers
 * with those of the walk in numpy. All stacks belong to one process.
 */
#include <uapi/linux/bpf.h>
#include <linux/types.h>

static long bpf_task_pt_regs(void *task)
{
	return (long)task;
}

#include "unwind.bpf.h"

struct stack {
	u64 registers[DWARF_REGISTERS];
	u64 pc;
	u64 start;
	u64 first; /* of its words, in `memory` */
	u64 words;
	u32 unreadable;
	u32 pc_is_return_address;
};

static struct {
	const struct mapping *mappings;
	const struct table *tables;
	const struct page *pages;
	const struct row *rows;
	const struct stack *stack;
	const u64 *memory;
	u64 requests;
} world;

static long read_copied(void *to, u32 size, const void *from)
{
	u64 offset = (u64)from - world.stack->start;
	u64 first = world.stack->start >> 12, last = ((u64)from + size - 1) >> 12;

	if (offset >= world.stack->words * WORD || size > world.stack->words * WORD - offset)
		return -14;
	for (u64 page = (u64)from >> 12; page <= last; page++)
		if (world.stack->unreadable >> (page - first) & 1)
			return -14;
	__builtin_memcpy(to, (const char *)(world.memory + world.stack->first) + offset, size);
	return 0;
}

static __always_inline struct process *lookup_process(u32 pid, u32 nth)
{
	return NULL;
}

static __always_inline struct mapping *lookup_mapping(u32 first, u32 count, u64 address)
{
	for (u32 i = first; i < first + count; i++)
		if (world.mappings[i].start <= address && address < world.mappings[i].end)
			return (struct mapping *)&world.mappings[i];
	return NULL;
}

static __always_inline struct known_space *lookup_known_space(u32 space)
{
	static struct known_space known;

	return &known;
}

static __always_inline struct table *lookup_table(u32 executable)
{
	return (struct table *)&world.tables[executable];
}

static __always_inline struct page *lookup_page(u32 place)
{
	return (struct page *)&world.pages[place];
}

static __always_inline struct row *lookup_row(const struct page *page, u32 low, u32 *high)
{
	u32 found = page->first;

	for (u32 i = page->first; i < page->first + page->count; i++) {
		if (world.rows[i].pc_low > low) {
			*high = world.rows[i].pc_low;
			break;
		}
		found = i;
	}
	return (struct row *)&world.rows[found];
}

static __always_inline void send_request(struct request *request)
{
	world.requests++;
}

/* Walk them all; `space` is a number that no call before has had. */
u64 walk_all(u32 space, const struct mapping *mappings, u32 mapping_count,
	     const struct table *tables, const struct page *pages, const struct row *rows,
	     const struct stack *stacks, u32 stack_count, const u64 *memory, struct user_stack *found)
{
	read_user = read_copied;
	world.mappings = mappings;
	world.tables = tables;
	world.pages = pages;
	world.rows = rows;
	world.memory = memory;
	world.requests = 0;
	for (u32 i = 0; i < stack_count; i++) {
		const struct stack *stack = &stacks[i];
		struct walk walk = {
			.pc = stack->pc,
			.sp = stack->registers[7],
			.bp = stack->registers[6],
			.space = space,
			.mappings = mapping_count,
			.pc_is_return_address = stack->pc_is_return_address,
			.knows_others = true,
			.knows_rbx = true,
			.knows_bp = true,
		};
		u32 stop = GO_ON;

		world.stack = stack;
		__builtin_memcpy(walk.others, stack->registers, sizeof(walk.others));
		found[i].length = 0;
		while (stop == GO_ON)
			stop = walk_on(&walk, &found[i]);
		found[i].stop = stop;
	}
	return world.requests;
}
