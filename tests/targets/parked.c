/*
 * Runs for ever in `park`, below a chain of calls that its argument chooses. None of it keeps frame
 * pointers, so every frame has to be left by the rules that the compiler wrote down.
 */
#define _GNU_SOURCE
#include <alloca.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define KEEP __attribute__((noinline, noclone))

static volatile unsigned long sink;

/* A leaf without any call, so that a tick finds no other function on top. */
KEEP static void park(void)
{
	for (;;)
		sink++;
}

KEEP static int recursion(int depth)
{
	if (depth == 0)
		park();
	return recursion(depth - 1) + (int)sink;
}

KEEP static int compare(const void *a, const void *b)
{
	park();
	return a < b;
}

KEEP static void callback(void)
{
	int numbers[] = { 3, 1, 2 };

	qsort(numbers, 3, sizeof(*numbers), compare);
	sink++;
}

KEEP static void tail_end(int n)
{
	sink += n;
	park();
}

KEEP static void tail_call(int n)
{
	sink += 2 * n;
	tail_end(n + 1); /* a jump from -O2 on: this frame is gone */
}

KEEP static void on_signal(int number)
{
	sink += number;
	park();
}

KEEP static void interrupted(void)
{
	signal(SIGALRM, on_signal);
	alarm(1);
	for (;;)
		sink++;
}

KEEP static void on_another_stack(void)
{
	static char other[1 << 16];
	stack_t stack = { .ss_sp = other, .ss_size = sizeof(other) };
	struct sigaction action = { .sa_handler = on_signal, .sa_flags = SA_ONSTACK };

	sigaltstack(&stack, NULL);
	sigaction(SIGUSR1, &action, NULL);
	raise(SIGUSR1);
	sink++;
}

KEEP static void allocating(size_t size)
{
	char *memory = alloca(size);

	memset(memory, 1, size);
	sink += memory[size / 2];
	park();
	sink += memory[0];
}

KEEP static void variable_length(size_t size)
{
	char memory[size];

	memset(memory, 1, size);
	sink += memory[size / 2];
	park();
	sink += memory[0];
}

KEEP static void large_frame(void)
{
	char memory[1 << 18];

	memset(memory, 1, sizeof(memory));
	sink += memory[sink % sizeof(memory)];
	park();
	sink += memory[1];
}

/* The stack pointer is aligned down, and the way back is kept in memory. */
KEEP static void aligned(size_t size)
{
	_Alignas(64) char memory[256];
	char *more = alloca(size);

	memset(memory, 1, sizeof(memory));
	memset(more, 1, size);
	sink += memory[sink % sizeof(memory)] + more[0];
	park();
	sink += memory[1] + more[1];
}

static jmp_buf back;

KEEP static void jump_back(void)
{
	sink++;
	longjmp(back, 1);
}

KEEP static void jumping(void)
{
	if (setjmp(back) == 0)
		jump_back();
	sink++;
	park();
	sink++;
}

__attribute__((noreturn, noinline)) static void never(void)
{
	park();
	__builtin_unreachable();
}

KEEP static void call_at_the_end(void)
{
	sink++;
	never(); /* its return address lies behind this function */
}

KEEP static void clock_in_vdso(void)
{
	struct timespec now;

	for (;;) {
		clock_gettime(CLOCK_MONOTONIC, &now);
		sink += now.tv_nsec;
	}
}

KEEP static void in_the_kernel(void)
{
	char byte;
	int pipes[2];

	if (pipe(pipes))
		return;
	for (;;)
		if (write(pipes[1], "x", 1) == 1 && read(pipes[0], &byte, 1) == 1)
			sink++;
}

int main(int count, char **arguments)
{
	const char *what = count > 1 ? arguments[1] : "";

	if (!strcmp(what, "recursion"))
		recursion(200);
	else if (!strcmp(what, "callback"))
		callback();
	else if (!strcmp(what, "tail_call"))
		tail_call(count);
	else if (!strcmp(what, "signal"))
		interrupted();
	else if (!strcmp(what, "another_stack"))
		on_another_stack();
	else if (!strcmp(what, "alloca"))
		allocating(1000 + count);
	else if (!strcmp(what, "variable_length"))
		variable_length(3000 + count);
	else if (!strcmp(what, "large_frame"))
		large_frame();
	else if (!strcmp(what, "aligned"))
		aligned(100 + count);
	else if (!strcmp(what, "longjmp"))
		jumping();
	else if (!strcmp(what, "call_at_the_end"))
		call_at_the_end();
	else if (!strcmp(what, "vdso"))
		clock_in_vdso();
	else if (!strcmp(what, "kernel"))
		in_the_kernel();
	sink++;
	return 0;
}
