/*
 * Spends 60, 30 and 10 % of its time in the three links of one call chain: outer calls middle calls
 * inner, and each works for its share. With an argument "kernel" all of the work is reading from
 * /dev/zero, so that most of each link's time passes inside of the kernel.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static volatile uint64_t sink;
static int zero = -1;
static char buffer[1 << 16];

static uint64_t cpu_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

/* read(2) without the C library, whose wrapper may have no frame pointer. */
static inline __attribute__((always_inline)) long read_zero(void)
{
	long result;

	asm volatile("syscall"
		     : "=a"(result)
		     : "a"(SYS_read), "D"(zero), "S"(buffer), "d"(sizeof(buffer))
		     : "rcx", "r11", "memory");
	return result;
}

/* Inlined on purpose: the time belongs to the link that asked for it. */
static inline __attribute__((always_inline)) void work(uint64_t rounds)
{
	if (zero >= 0) {
		for (uint64_t i = 0; i < rounds; i++)
			sink += read_zero();
	} else {
		for (uint64_t i = 0; i < rounds; i++)
			sink += i * 3;
	}
}

__attribute__((noinline)) static void inner(uint64_t slice)
{
	sink += !__builtin_frame_address(0); /* a leaf gets no frame otherwise */
	work(slice * 10);
	sink++;
}

__attribute__((noinline)) static void middle(uint64_t slice)
{
	work(slice * 30);
	inner(slice);
	sink++;
}

__attribute__((noinline)) static void outer(uint64_t slice)
{
	work(slice * 60);
	middle(slice);
	sink++;
}

int main(int argc, char **argv)
{
	uint64_t end = cpu_ns() + (argc > 1 ? atoll(argv[1]) : 20) * 1000000000ULL;
	uint64_t slice;

	if (argc > 2 && !strcmp(argv[2], "kernel"))
		zero = open("/dev/zero", O_RDONLY);
	slice = zero >= 0 ? 3 : 10000;
	while (cpu_ns() < end)
		outer(slice);
	return 0;
}
