// SPDX-License-Identifier: GPL-2.0-only
/*
 * One program runs at every tick of every CPU: it counts the tick, reads both stacks of what runs
 * there, and adds one to the count of that stack. Each tick ends in exactly one place, a counter, the
 * counts map or a copy, so that ticks = stored + copied + idle + filtered + lost holds as integers.
 *
 * Maps stand twice, as two map generations. `active` names the one that ticks write to; user space
 * flips it, waits until no program can still hold the old number, and empties the idle one in peace.
 *
 * The file is long because bcc knows maps only in the file that it compiles: all code with maps of
 * its own stands here.
 */
#include "sampler.bpf.h"
#include "tables.bpf.h"
#include "chain.bpf.h"

BPF_F_TABLE("array", u32, struct process, processes, PROCESSES_CAPACITY, MMAPABLE);
BPF_ARRAY(mappings, struct mapping, MAPPINGS_CAPACITY);
BPF_ARRAY(executables, struct table, EXECUTABLES_CAPACITY);
BPF_ARRAY(pages, struct page, PAGES_CAPACITY);
BPF_F_TABLE("array", u32, struct row, shard, SHARD_ROWS, MMAPABLE);
BPF_TABLE("array_of_maps$shard", int, int, shards, SHARDS_CAPACITY);
BPF_PERCPU_ARRAY(known, struct known_space, KNOWN_SPACES);
BPF_RINGBUF_OUTPUT(requests, REQUEST_PAGES);
BPF_RINGBUF_OUTPUT(copies, COPY_RING_PAGES);
BPF_ARRAY(last_wake_ns, u64, 1);
BPF_ARRAY(interpreters, struct interpreter, INTERPRETERS_CAPACITY);
BPF_TABLE("lru_hash", struct program_key, struct program, known_programs, PROGRAMS_CAPACITY);
BPF_ARRAY(seen_codes, u64, SEEN_PLACES);
BPF_RINGBUF_OUTPUT(codes, CODE_RING_PAGES);

/* Of a map within a map, for which bcc has no word. */
#define lookup_in(map, key) \
	(((void *(*)(void *, const void *))BPF_FUNC_map_lookup_elem)(map, key))

/* Return the process in the pid's `nth` place, whichever it is. */
static __always_inline struct process *lookup_process(u32 pid, u32 nth)
{
	u32 place = (pid ^ nth) % PROCESSES_CAPACITY;

	return processes.lookup(&place);
}

/* Bisect an address space for the mapping at `address`. */
static __always_inline struct mapping *lookup_mapping(u32 first, u32 count, u64 address)
{
	struct mapping *mapping;

	for (u32 i = 0; i < 16; i++) {
		u32 half = count >> 1, at = first + half;

		if (half == 0)
			break;
		mapping = mappings.lookup(&at);
		if (!mapping)
			return NULL;
		if (mapping->start <= address) {
			first = at;
			count -= half;
		} else {
			count = half;
		}
	}
	mapping = mappings.lookup(&first);
	if (!mapping || address < mapping->start || address >= mapping->end)
		return NULL;
	return mapping;
}

static __always_inline struct known_space *lookup_known_space(u32 space)
{
	u32 place = space % KNOWN_SPACES;

	return known.lookup(&place);
}

static __always_inline struct page *lookup_page(u32 place)
{
	return pages.lookup(&place);
}

static __always_inline struct table *lookup_table(u32 executable)
{
	return executables.lookup(&executable);
}

/*
 * Bisect a page for the row in force at `low`, and set `high` to where the next one begins; every
 * page begins with a row for its first byte.
 */
static __always_inline struct row *lookup_row(const struct page *page, u32 low, u32 *high)
{
	u32 first = page->first & (SHARD_ROWS - 1), count = page->count;
	int number = page->first / SHARD_ROWS;
	void *rows = shards.lookup(&number);
	struct row *row;

	if (!rows)
		return NULL;
	for (u32 i = 0; i <= PAGE_BITS; i++) {
		u32 half = count >> 1, at = first + half;

		if (half == 0)
			break;
		row = lookup_in(rows, &at);
		if (!row)
			return NULL;
		if (row->pc_low <= low) {
			first = at;
			count -= half;
		} else {
			*high = row->pc_low;
			count = half;
		}
	}
	return lookup_in(rows, &first);
}

/* Request something. The reader is woken only now and then: a wake costs more than a request. */
static __always_inline void send_request(struct request *request)
{
	u64 now = bpf_ktime_get_ns();
	u64 flags = BPF_RB_NO_WAKEUP;
	u32 zero = 0;
	u64 *last = last_wake_ns.lookup(&zero);

	if (last && now - *last > WAKE_PERIOD_NS) {
		*last = now;
		flags = BPF_RB_FORCE_WAKEUP;
	}
	requests.ringbuf_output(request, sizeof(*request), flags);
}

static __always_inline struct interpreter *lookup_interpreter(u32 number)
{
	return interpreters.lookup(&number);
}

static __always_inline u64 *lookup_seen(u32 place)
{
	return seen_codes.lookup(&place);
}

#include "unwind.bpf.h"
#include "copy.bpf.h"

enum { ON_WALK, ON_COPY, ON_CHAIN, ON_CODES }; /* places in `programs` */

struct scratch {
	struct count_key key;
	struct {
		u64 samples;
		u64 first_ns;
		u64 last_ns;
		char leader_comm[COMM_SIZE];
	} first; /* with what follows it is a struct count */
	struct user_stack user;
	struct walk walk;
	struct kernel_stack kernel;
	u64 leader;
	u32 generation;
	u32 programs; /* how many have walked this stack */
	u32 native_length; /* of the stack, the words of the native walk */
	u32 has_chain; /* its interpreter frames are still to be read */
	struct chain chain;
};

BPF_ARRAY(active, u32, 1);
BPF_PERCPU_ARRAY(counters, struct counters, 2);
BPF_PERCPU_ARRAY(scratch, struct scratch, 1);
BPF_ARRAY(copying, struct copying, CPUS); /* a value of a per-CPU array may have 32 KB at most */
BPF_PROG_ARRAY(programs, 4);
BPF_ARRAY(code_records, struct code_record, CPUS);
BPF_HASH(counts_0, struct count_key, struct count, CAPACITY);
BPF_HASH(counts_1, struct count_key, struct count, CAPACITY);
BPF_HASH(user_stacks_0, u64, struct long_stack, LONG_CAPACITY);
BPF_HASH(user_stacks_1, u64, struct long_stack, LONG_CAPACITY);
BPF_HASH(deep_stacks_0, u64, struct user_stack, DEEP_CAPACITY);
BPF_HASH(deep_stacks_1, u64, struct user_stack, DEEP_CAPACITY);
BPF_HASH(kernel_stacks_0, u64, struct kernel_stack, CAPACITY);
BPF_HASH(kernel_stacks_1, u64, struct kernel_stack, CAPACITY);

#ifdef TIMER_FUNCTION
struct expiries {
	u64 all;
	u64 own; /* while the process that empties the maps ran */
};

/* How often the timers of our events have expired on each CPU, by map generation. */
BPF_PERCPU_ARRAY(expiries, struct expiries, 2);
/* The map generation in which the timer that last expired was counted, plus 1. */
BPF_PERCPU_ARRAY(expired_in, u32, 1);
/* The id of `on_tick`. */
BPF_ARRAY(tick_program, u32, 1);

/* Return the generation in which this tick's expiry was counted, so that both are in the same. */
static __always_inline u32 generation_of_tick(u32 generation)
{
	u32 zero = 0;
	u32 *expired = expired_in.lookup(&zero);

	return expired && *expired ? (*expired - 1) & 1 : generation;
}
#else
static __always_inline u32 generation_of_tick(u32 generation)
{
	return generation;
}
#endif

#ifdef SELECTED_CAPACITY
/* Selected processes: pid -> start time, 0 for one whose start user space does not know exactly. */
BPF_HASH(selected, u32, u64, SELECTED_CAPACITY);
/* Children that found no room in `selected`. */
BPF_ARRAY(unselected, u64, 1);

static __always_inline bool is_selected(u32 pid, u64 start_ns)
{
	u64 *start = selected.lookup(&pid);

	return start && (*start == 0 || *start == start_ns);
}
#else
static __always_inline bool is_selected(u32 pid, u64 start_ns)
{
	return true;
}
#endif

static __always_inline u64 leader_of(u64 task)
{
	return kernel_u64(task + TASK_GROUP_LEADER);
}

/* Why a map took no more: 0 where it did. An entry that another CPU put there first is as good. */
static __always_inline u32 loss_of(long error)
{
	if (error == 0 || error == -17 /* EEXIST */)
		return 0;
	return error == -7 /* E2BIG */ ? COUNTER_MAP_FULL : COUNTER_MAP_BUSY;
}

/* Put a stack beyond MAX_LONG_WORDS, or its leaf part if there are too many. */
static __always_inline bool put_deep_stack(u32 generation, struct scratch *at, u64 hash)
{
	if (generation) {
		if (deep_stacks_1.lookup(&hash) || !deep_stacks_1.insert(&hash, &at->user))
			return true;
	} else {
		if (deep_stacks_0.lookup(&hash) || !deep_stacks_0.insert(&hash, &at->user))
			return true;
	}
	at->user.length = MAX_LONG_WORDS;
	at->user.stop = STOP_TRUNCATED;
	return false;
}

static __always_inline u32 put_user_stack(u32 generation, struct scratch *at)
{
	u64 hash = mix(at->chain.hash, ((u64)at->user.stop << 32) | at->user.length);
	struct long_stack *stack = (struct long_stack *)&at->user;
	long error = 0;

	for (u32 i = 0; i < MAX_NATIVE_WORDS + 1; i++) {
		asm volatile("" : "+r"(i));
		if (i >= at->native_length)
			break;
		hash = mix(hash, at->user.words[i]);
	}
	at->key.user_stack = hash;
	if (at->user.length <= MAX_SHORT_WORDS)
		return 0;
	if (unlikely(at->user.length > MAX_LONG_WORDS)) {
		if (put_deep_stack(generation, at, hash))
			return 0;
		at->key.user_stack = hash = mix(hash, 1);
	}
	if (generation) {
		if (!user_stacks_1.lookup(&hash))
			error = user_stacks_1.insert(&hash, stack);
	} else {
		if (!user_stacks_0.lookup(&hash))
			error = user_stacks_0.insert(&hash, stack);
	}
	return loss_of(error);
}

/* A stack that is missing or cut is put as well, so that its samples carry the reason. */
static __always_inline u32 put_kernel_stack(u32 generation, struct scratch *at,
					    struct bpf_perf_event_data *ctx)
{
	u64 hash;
	long error = 0, size;

	at->key.kernel_stack = 0;
	if (is_in_user_mode(ctx))
		return 0;
	size = bpf_get_stack(ctx, at->kernel.words, KERNEL_STACK_BYTES, 0);
	at->kernel.length = size > 0 ? (u32)size / sizeof(u64) : 0;
	at->kernel.stop = 0;
	if (size <= 0)
		at->kernel.stop = STOP_KERNEL_FAILED;
	else if (size >= KERNEL_STACK_BYTES) /* the leaf part: there is no telling by how much */
		at->kernel.stop = STOP_KERNEL_TRUNCATED;
	hash = mix(0, ((u64)at->kernel.stop << 32) | at->kernel.length);
	for (u32 i = 0; i < MAX_KERNEL_WORDS; i++) {
		asm volatile("" : "+r"(i));
		if (i >= at->kernel.length)
			break;
		hash = mix(hash, at->kernel.words[i]);
	}
	at->key.kernel_stack = hash;
	if (generation) {
		if (!kernel_stacks_1.lookup(&hash))
			error = kernel_stacks_1.insert(&hash, &at->kernel);
	} else {
		if (!kernel_stacks_0.lookup(&hash))
			error = kernel_stacks_0.insert(&hash, &at->kernel);
	}
	return loss_of(error);
}

static __always_inline u32 add_count(u32 generation, struct scratch *at, u64 leader)
{
	u64 now = bpf_ktime_get_ns();
	struct count *count;
	long error;

	count = generation ? counts_1.lookup(&at->key) : counts_0.lookup(&at->key);
	if (count) {
		/* A thread runs on one CPU at a time, so nobody else writes here. */
		count->samples++;
		count->last_ns = now;
		return 0;
	}
	at->first.samples = 1;
	at->first.first_ns = now;
	at->first.last_ns = now;
	read_kernel(at->first.leader_comm, COMM_SIZE, (const void *)(leader + TASK_COMM));
	count = (struct count *)&at->first;
	if (generation)
		error = counts_1.insert(&at->key, count);
	else
		error = counts_0.insert(&at->key, count);
	/* Unlike a stack, a count that somebody else put there is not this tick's. */
	if (error == 0)
		return 0;
	return error == -7 ? COUNTER_MAP_FULL : COUNTER_MAP_BUSY;
}

/*
 * Put the tick where it belongs, now that both stacks are known. Interpreter frames are read first, by
 * a program that comes back. A stack whose walk lacked something is copied instead; the copying program
 * comes back if it may not.
 */
static __always_inline int count_tick(struct bpf_perf_event_data *ctx, struct scratch *at)
{
	u32 generation = at->generation & 1;
	struct counters *count = counters.lookup(&generation);
	u32 loss;

	if (!at->native_length)
		at->native_length = at->user.length;
	if (at->has_chain) {
		at->has_chain = false;
		programs.call(ctx, ON_CHAIN);
	}
	if (COPY_NS_PER_BYTE && unlikely(at->walk.has_requested) && at->programs < MAX_PROGRAMS - 1)
		programs.call(ctx, ON_COPY);
	loss = put_user_stack(generation, at);
	if (!loss)
		loss = put_kernel_stack(generation, at, ctx);
	if (!loss)
		loss = add_count(generation, at, at->leader);
	if (count && loss && loss < COUNTERS)
		count->values[loss]++;
	return 0;
}

/*
 * One program may do only so much, so a deep stack is walked by several, each calling the next.
 * A call that fails falls through: the stack ends there, and says so.
 */
int on_walk(struct bpf_perf_event_data *ctx)
{
	u32 zero = 0, stop;
	struct scratch *at = scratch.lookup(&zero);

	if (!at)
		return 0;
	stop = at->user.stop;
	if (stop == GO_ON)
		stop = walk_on(&at->walk, &at->user);
	if (stop == GO_ON) {
		if (++at->programs < MAX_WALK_PROGRAMS)
			programs.call(ctx, ON_WALK);
		stop = STOP_TRUNCATED;
	}
	at->user.stop = stop;
	return count_tick(ctx, at);
}

/*
 * Find where a program has loaded the library with the interpreter; `bias` is the program's own. The
 * dynamic loader's list of files is glibc's and musl's (link.h): struct r_debug and struct link_map.
 */
#define R_MAP 8
#define MAX_LIBRARIES 16
struct link_map {
	u64 bias;
	u64 name;
	u64 dynamic;
	u64 next;
};

static __always_inline bool find_library(const struct program *program, u64 *bias)
{
	struct link_map library = {};

	if (read_pointer(&library.next, program->debug + *bias) ||
	    read_pointer(&library.next, library.next + R_MAP))
		return false;
	for (u32 i = 0; i < MAX_LIBRARIES; i++) {
		if (!library.next || read_user(&library, sizeof(library), (const void *)library.next))
			return false;
		if (library.dynamic - library.bias == program->dynamic) {
			*bias = library.bias;
			return true;
		}
	}
	return false;
}

/*
 * Find the runtime of a process that user space does not know yet: by its program's file, if that is
 * known from another process. What is found is checked as ever, so that a file with the number of an
 * earlier one does no harm.
 */
static __always_inline void find_program(void *task, struct walk *walk)
{
	u64 mm = MEMBER(task, TASK_MM, u64), file = kernel_u64(mm + MM_EXE_FILE);
	u64 inode = kernel_u64(file + FILE_F_INODE);
	struct program_key key = {
		.inode = kernel_u64(inode + INODE_I_INO),
		.device = kernel_u32(kernel_u64(inode + INODE_I_SB) + SUPER_S_DEV),
	};
	struct program *program = known_programs.lookup(&key);

	if (!file || !program)
		return;
	walk->runtime.bias = kernel_u64(mm + MM_START_CODE) - program->start_code;
	if (!program->debug || find_library(program, &walk->runtime.bias))
		walk->runtime.interpreter = program->interpreter;
}

/* Read the interpreter's frames behind the native ones, and then go on. */
int on_chain(struct bpf_perf_event_data *ctx)
{
	u32 zero = 0, why = GO_ON, number;
	struct scratch *at = scratch.lookup(&zero);
	void *task = (void *)bpf_get_current_task_btf();
	struct interpreter *layout;

	if (!at)
		return 0;
	if (!at->chain.programs && !at->walk.mappings)
		find_program(task, &at->walk);
	number = at->walk.runtime.interpreter;
	layout = lookup_interpreter(number);
	if (number && layout) {
		if (!at->chain.programs) {
			at->chain.identity = mix(mix(at->key.pid, at->key.start_ns), at->key.exec_id);
			/* User space may not have taken them all: they are new again from time to time. */
			at->chain.identity += (bpf_ktime_get_ns() + at->key.start_ns) >> SEEN_SHIFT;
			why = begin_chain(&at->chain, &at->user, &at->walk, layout,
					  kernel_u64((u64)task + TASK_THREAD + THREAD_FSBASE));
		}
		for (u32 i = 0; i < CHAIN_FRAMES && why == GO_ON; i++) {
			asm volatile("" : "+r"(i));
			why = leave_interpreter_frame(&at->chain, &at->user, layout,
						      layout->code_type + at->walk.runtime.bias);
		}
		if (why == GO_ON) {
			if (++at->chain.programs <= CHAIN_PROGRAMS)
				programs.call(ctx, ON_CHAIN);
			why = CHAIN_TRUNCATED;
		}
		end_chain(&at->chain, &at->user, why);
		if (at->chain.found)
			programs.call(ctx, ON_CODES);
	}
	programs.call(ctx, ON_WALK);
	return 0;
}

/* Send code objects that are new; what finds no room is new again the next time. */
int on_codes(struct bpf_perf_event_data *ctx)
{
	u32 zero = 0, cpu = bpf_get_smp_processor_id(), number, size, place;
	struct scratch *at = scratch.lookup(&zero);
	struct code_record *record = code_records.lookup(&cpu);
	struct interpreter *layout;
	u64 *seen, key;

	if (!at || !record)
		return 0;
	number = at->walk.runtime.interpreter;
	layout = lookup_interpreter(number);
	if (!layout)
		return 0;
	record->start_ns = at->key.start_ns;
	record->exec_id = at->key.exec_id;
	record->cgroup_id = at->key.cgroup_id;
	record->pid = at->key.pid;
	record->interpreter = number;
	for (u32 i = 0; i < CODES_PER_PROGRAM; i++) {
		asm volatile("" : "+r"(i));
		place = at->chain.sent;
		if (place >= at->chain.found)
			break;
		asm volatile("" : "+r"(place));
		place &= NEW_CODES - 1;
		at->chain.sent = place + 1;
		key = key_of_code(&at->chain, at->chain.codes[place], at->chain.checksums[place]);
		record->checksum = at->chain.checksums[place];
		size = read_code(record, layout, at->chain.codes[place]);
		asm volatile("" : "+r"(size));
		if (size > CODE_HEAD + CODE_CONTENT)
			size = CODE_HEAD + CODE_CONTENT;
		if (!codes.ringbuf_output(record, size, BPF_RB_NO_WAKEUP))
			continue;
		seen = lookup_seen(key % SEEN_PLACES);
		if (seen)
			*seen = 0;
	}
	if (at->chain.sent < at->chain.found)
		programs.call(ctx, ON_CODES);
	programs.call(ctx, ON_WALK);
	return 0;
}

/* Send registers and stack to user space; beyond the budget the tick is counted as it was walked. */
int on_copy(struct bpf_perf_event_data *ctx)
{
	u32 zero = 0, cpu = bpf_get_smp_processor_id(), generation, size, loss;
	struct scratch *at = scratch.lookup(&zero);
	struct copying *to = copying.lookup(&cpu);
	struct counters *count;

	if (!at || !to)
		return 0;
	generation = at->generation & 1;
	count = counters.lookup(&generation);
	if (!count)
		return 0;
	if (may_copy(to)) {
		loss = put_kernel_stack(generation, at, ctx);
		if (loss && loss < COUNTERS) {
			count->values[loss]++;
			return 0;
		}
		at->key.user_stack = 0;
		to->copy.key = at->key;
		read_kernel(to->copy.leader_comm, COMM_SIZE, (const void *)(at->leader + TASK_COMM));
		to->copy.generation = generation;
		size = copy_user(ctx, (void *)bpf_get_current_task_btf(), to, &at->walk, &at->user);
		if (!copies.ringbuf_output(&to->copy, size, BPF_RB_NO_WAKEUP)) {
			count->values[COUNTER_COPIED]++;
			return 0;
		}
	}
	count->values[COUNTER_UNCOPIED]++;
	at->walk.has_requested = false;
	programs.call(ctx, ON_WALK);
	count->values[COUNTER_MAP_BUSY]++; /* the call has failed: it never should */
	return 0;
}

int on_tick(struct bpf_perf_event_data *ctx)
{
	u64 ids = bpf_get_current_pid_tgid();
	const char *task = (const char *)bpf_get_current_task_btf(), *leader;
	struct counters *count;
	struct scratch *at;
	u32 *generation_at, zero = 0, generation, stop;
	u64 start_ns;

	generation_at = active.lookup(&zero);
	if (!generation_at)
		return 0;
	generation = *generation_at & 1;
	if ((u32)ids != 0) /* each CPU's idle thread has tid 0; its expiries are not counted */
		generation = generation_of_tick(generation);
	count = counters.lookup(&generation);
	at = scratch.lookup(&zero);
	if (!count || !at)
		return 0;
	count->values[COUNTER_TICKS]++;
	if (ids >> 32 == SAMPLER_PID)
		count->values[COUNTER_OWN]++;
	if ((u32)ids == 0) {
		count->values[COUNTER_IDLE]++;
		return 0;
	}
	at->generation = generation;
	at->programs = 0;
	at->native_length = 0;
	at->has_chain = false;
	at->chain.hash = 0;
	at->chain.programs = 0;
	at->chain.found = 0;
	at->chain.sent = 0;
	leader = MEMBER(task, TASK_GROUP_LEADER, const char *);
	at->leader = (u64)leader;
	start_ns = MEMBER(leader, TASK_START_BOOTTIME, u64);
	if (!is_selected(ids >> 32, start_ns)) {
		count->values[COUNTER_FILTERED]++;
		return 0;
	}
	at->key.start_ns = start_ns;
	at->key.pid = ids >> 32;
	at->key.tid = (u32)ids;
	at->key.exec_id = MEMBER(task, TASK_SELF_EXEC_ID, u64);
	at->key.cgroup_id = bpf_get_current_cgroup_id();
	bpf_get_current_comm(at->key.comm, COMM_SIZE);

	stop = begin_walk(ctx, (void *)task, &at->key, &at->walk, &at->user);
	if (stop == GO_ON) {
		at->has_chain = at->walk.runtime.interpreter || !at->walk.mappings;
		stop = walk_on(&at->walk, &at->user);
	}
	if (stop == GO_ON) {
		at->programs = 1;
		at->user.stop = GO_ON;
		programs.call(ctx, ON_WALK);
		stop = STOP_TRUNCATED;
	}
	at->user.stop = stop;
	return count_tick(ctx, at);
}

#ifdef SELECTED_CAPACITY
/* sched_process_fork(parent, child): what a selected process starts is selected before it runs. */
int on_fork(struct bpf_raw_tracepoint_args *ctx)
{
	u64 parent_leader = leader_of(ctx->args[0]);
	u32 parent = kernel_u32(ctx->args[0] + TASK_TGID);
	u32 child = kernel_u32(ctx->args[1] + TASK_TGID);
	u64 start_ns = kernel_u64(leader_of(ctx->args[1]) + TASK_START_BOOTTIME);
	u64 *count;
	u32 zero = 0;

	if (parent == child || !is_selected(parent, kernel_u64(parent_leader + TASK_START_BOOTTIME)))
		return 0;
	if (selected.update(&child, &start_ns)) {
		count = unselected.lookup(&zero);
		if (count)
			__sync_fetch_and_add(count, 1);
	}
	return 0;
}

/*
 * sched_process_free(task): the pid may be in use again by now, so only this very process's entry
 * goes; the start time decides.
 */
int on_free(struct bpf_raw_tracepoint_args *ctx)
{
	u32 pid = kernel_u32(ctx->args[0] + TASK_TGID);
	u64 start_ns = kernel_u64(ctx->args[0] + TASK_START_BOOTTIME);
	u64 *start;

	if (kernel_u32(ctx->args[0] + TASK_PID) != pid)
		return 0;
	start = selected.lookup(&pid);
	if (start && *start == start_ns)
		selected.delete(&pid);
	return 0;
}
#endif

#ifdef TIMER_FUNCTION
/*
 * hrtimer_expire_entry(timer, now): the kernel skips our program where another one is active on that
 * CPU (bpf_prog_active, in bpf_overflow_handler), as tracers are whose programs are called by a
 * tracepoint or a kprobe; and where somebody, as we do, reads or writes a map there
 * (bpf_disable_instrumentation). It does not skip those of raw tracepoints. So the expiries of our
 * timers that no tick follows are the ticks that were skipped.
 */
int on_expire(struct bpf_raw_tracepoint_args *ctx)
{
	u64 timer = ctx->args[0], program;
	struct expiries *count;
	u32 zero = 0, generation, *active_at, *id, *expired;

	/* On an idle CPU the kernel's timer may expire without a tick, and nothing is lost by it. */
	if ((u32)bpf_get_current_pid_tgid() == 0)
		return 0;
	if (kernel_u64(timer + HRTIMER_FUNCTION) != TIMER_FUNCTION)
		return 0;
	active_at = active.lookup(&zero);
	id = tick_program.lookup(&zero);
	expired = expired_in.lookup(&zero);
	if (!active_at || !id || !expired)
		return 0;
	program = kernel_u64(timer - EVENT_TIMER + EVENT_PROGRAM);
	if (!program || kernel_u32(kernel_u64(program + PROGRAM_AUX) + AUX_ID) != *id)
		return 0;
	generation = *active_at & 1;
	count = expiries.lookup(&generation);
	if (!count)
		return 0;
	count->all++;
	if (bpf_get_current_pid_tgid() >> 32 == SAMPLER_PID)
		count->own++;
	*expired = generation + 1;
	return 0;
}
#endif

#define BPF_LICENSE GPL
