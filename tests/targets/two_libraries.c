/*
 * Spends two thirds of its time in one shared library and one third in another. The argument is
 * the seconds of CPU time; the libraries' addresses differ from process to process.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

void library_one(uint64_t rounds);
void library_two(uint64_t rounds);

static uint64_t cpu_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

int main(int argc, char **argv)
{
	uint64_t now = cpu_ns(), end = now + (argc > 1 ? atoll(argv[1]) : 20) * 1000000000ULL;
	uint64_t before, one = 0, two = 0;

	/* The clock decides whose turn it is: the same loop need not be as fast in both. */
	while (now < end) {
		before = now;
		if (one <= 2 * two) {
			library_one(100000);
			now = cpu_ns();
			one += now - before;
		} else {
			library_two(100000);
			now = cpu_ns();
			two += now - before;
		}
	}
	return 0;
}
