/* Spends 60, 30 and 10 % of its time in three functions, in slices of a millisecond of CPU time. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

static volatile uint64_t sink;

static uint64_t cpu_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

/*
 * Each body differs, so that no linker folds the three into one. Asking for the frame's address makes
 * the compiler set one up, which it leaves out of leaf functions even with frame pointers on.
 */
#define WORK(name, constant)                                                                     \
	__attribute__((noinline)) static void name(uint64_t rounds)                               \
	{                                                                                          \
		sink += !__builtin_frame_address(0);                                               \
		for (uint64_t i = 0; i < rounds; i++)                                              \
			sink += i * (constant);                                                    \
	}

WORK(spends_sixty, 3)
WORK(spends_thirty, 5)
WORK(spends_ten, 7)

static uint64_t rounds_of(uint64_t ns)
{
	uint64_t rounds = 1 << 22, begun = cpu_ns();

	spends_sixty(rounds);
	return rounds * ns / (cpu_ns() - begun) + 1;
}

int main(int argc, char **argv)
{
	uint64_t end = cpu_ns() + (argc > 1 ? atoll(argv[1]) : 20) * 1000000000ULL;
	uint64_t slice = rounds_of(100000);

	while (cpu_ns() < end) {
		spends_sixty(60 * slice / 10);
		spends_thirty(30 * slice / 10);
		spends_ten(10 * slice / 10);
	}
	return 0;
}
