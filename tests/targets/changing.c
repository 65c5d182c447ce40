/*
 * Spins until SIGUSR1, then becomes something else for ever: "open" calls into a library that it
 * opens then (this same file, compiled as one), "exec" starts another program in its place (this
 * one, by another name), "fork" spins in a child, too.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

static volatile sig_atomic_t is_told;
static volatile unsigned long sink;

static void on_signal(int number)
{
	is_told = number;
}

__attribute__((noinline, noclone)) void spin(int is_for_ever)
{
	while (is_for_ever || !is_told)
		sink++;
}

__attribute__((noinline, noclone)) int spin_deeper(int depth)
{
	if (depth == 0)
		spin(1);
	return spin_deeper(depth - 1) + (int)sink;
}

int main(int argc, char **argv)
{
	if (argc < 3) {
		prctl(PR_SET_NAME, "sleepless");
		return spin_deeper(5);
	}
	signal(SIGUSR1, on_signal);
	spin(0);
	if (!strcmp(argv[1], "open")) {
		int (*function)(int) = (int (*)(int))dlsym(dlopen(argv[2], RTLD_NOW), "spin_deeper");

		return function(5);
	}
	if (!strcmp(argv[1], "exec"))
		return execl("/proc/self/exe", argv[0], "again", NULL);
	if (fork() == 0)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	return spin_deeper(5);
}
