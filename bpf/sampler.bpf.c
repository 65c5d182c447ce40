// SPDX-License-Identifier: GPL-2.0-only
/*
 * One program runs at every tick of every CPU: it counts the tick, reads both stacks of what runs
 * there, and adds one to the count of that stack. Each tick ends in exactly one place, a counter or
 * the counts map, so that ticks = stored + idle + filtered + lost holds as integers.
 *
 * Maps stand twice. `active` names the generation that ticks write to; user space flips it, waits
 * until no program can still hold the old number, and empties the idle one in peace.
 */
#include "sampler.bpf.h"
#include "unwind.bpf.h"

struct scratch {
	struct count_key key;
	struct count first_count;
	struct user_stack user;
	struct kernel_stack kernel;
};

BPF_ARRAY(active, u32, 1);
BPF_PERCPU_ARRAY(counters, struct counters, 2);
BPF_PERCPU_ARRAY(scratch, struct scratch, 1);
BPF_HASH(counts_0, struct count_key, struct count, CAPACITY);
BPF_HASH(counts_1, struct count_key, struct count, CAPACITY);
BPF_HASH(user_stacks_0, u64, struct user_stack, CAPACITY);
BPF_HASH(user_stacks_1, u64, struct user_stack, CAPACITY);
BPF_HASH(kernel_stacks_0, u64, struct kernel_stack, CAPACITY);
BPF_HASH(kernel_stacks_1, u64, struct kernel_stack, CAPACITY);

#ifdef SELECTED_CAPACITY
/* Selected processes: pid -> start time, 0 for one whose start user space does not know exactly. */
BPF_HASH(selected, u32, u64, SELECTED_CAPACITY);
/* Children that found no room in `selected`. */
BPF_ARRAY(unselected, u64, 1);

static __always_inline bool is_selected(u32 pid, u64 start_ns)
{
	u64 *wanted = selected.lookup(&pid);

	return wanted && (*wanted == 0 || *wanted == start_ns);
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

static __always_inline u32 put_user_stack(u32 generation, struct scratch *at)
{
	u64 hash = mix(0, ((u64)at->user.stop << 32) | at->user.length);
	long error = 0;

	for (u32 i = 0; i < MAX_USER_WORDS; i++) {
		asm volatile("" : "+r"(i));
		if (i >= at->user.length)
			break;
		hash = mix(hash, at->user.words[i]);
	}
	at->key.user_stack = hash;
	if (generation) {
		if (!user_stacks_1.lookup(&hash))
			error = user_stacks_1.insert(&hash, &at->user);
	} else {
		if (!user_stacks_0.lookup(&hash))
			error = user_stacks_0.insert(&hash, &at->user);
	}
	return loss_of(error);
}

static __always_inline u32 put_kernel_stack(u32 generation, struct scratch *at,
					    struct bpf_perf_event_data *ctx)
{
	long size = bpf_get_stack(ctx, at->kernel.words, sizeof(at->kernel.words), 0);
	u64 hash = 0;
	long error = 0;

	at->key.kernel_stack = 0;
	if (size <= 0)
		return 0;
	at->kernel.length = (u32)size / sizeof(u64);
	at->kernel.stop = 0;
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
	at->first_count.samples = 1;
	at->first_count.first_ns = now;
	at->first_count.last_ns = now;
	read_kernel(at->first_count.leader_comm, COMM_SIZE, (const void *)(leader + TASK_COMM));
	if (generation)
		error = counts_1.insert(&at->key, &at->first_count);
	else
		error = counts_0.insert(&at->key, &at->first_count);
	/* Unlike a stack, a count that somebody else put there is not this tick's. */
	if (error == 0)
		return 0;
	return error == -7 ? COUNTER_MAP_FULL : COUNTER_MAP_BUSY;
}

int on_tick(struct bpf_perf_event_data *ctx)
{
	u64 ids = bpf_get_current_pid_tgid();
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	struct counters *count;
	struct scratch *at;
	u32 *generation_at, zero = 0, generation, loss;
	u64 leader, start_ns;

	generation_at = active.lookup(&zero);
	if (!generation_at)
		return 0;
	generation = *generation_at & 1;
	count = counters.lookup(&generation);
	at = scratch.lookup(&zero);
	if (!count || !at)
		return 0;
	count->values[COUNTER_TICKS]++;
	if ((u32)ids == 0) { /* each CPU's idle thread has tid 0 */
		count->values[COUNTER_IDLE]++;
		return 0;
	}
	leader = leader_of((u64)task);
	start_ns = kernel_u64(leader + TASK_START_BOOTTIME);
	if (!is_selected(ids >> 32, start_ns)) {
		count->values[COUNTER_FILTERED]++;
		return 0;
	}
	at->key.start_ns = start_ns;
	at->key.pid = ids >> 32;
	at->key.tid = (u32)ids;
	at->key.exec_id = kernel_u64((u64)task + TASK_SELF_EXEC_ID);
	at->key.cgroup_id = bpf_get_current_cgroup_id();
	bpf_get_current_comm(at->key.comm, COMM_SIZE);

	unwind_user(ctx, (void *)task, &at->user);
	loss = put_user_stack(generation, at);
	if (!loss)
		loss = put_kernel_stack(generation, at, ctx);
	if (!loss)
		loss = add_count(generation, at, leader);
	if (loss && loss < COUNTERS)
		count->values[loss]++;
	return 0;
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
	u64 *wanted;

	if (kernel_u32(ctx->args[0] + TASK_PID) != pid)
		return 0;
	wanted = selected.lookup(&pid);
	if (wanted && *wanted == start_ns)
		selected.delete(&pid);
	return 0;
}
#endif

#define BPF_LICENSE GPL
