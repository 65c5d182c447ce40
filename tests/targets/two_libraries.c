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
	uint64_t end = cpu_ns() + (argc > 1 ? atoll(argv[1]) : 20) * 1000000000ULL;

	while (cpu_ns() < end) {
		library_one(20000);
		library_two(10000);
	}
	return 0;
}
