/*
 * Spins in a function that it has moved elsewhere with mremap, of which the kernel writes no record.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <sys/mman.h>

#define PAGE 4096

static volatile unsigned long sink;

__attribute__((noinline, noclone, section(".moved"), aligned(PAGE))) void
spin(volatile unsigned long *at)
{
	for (;;)
		++*at;
}

/* The rest of the page, so that nothing else is moved. */
__attribute__((used, section(".moved"), aligned(PAGE))) static void after(void)
{
}

int main(void)
{
	char *room = mmap(0, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	void (*moved)(volatile unsigned long *) = mremap((void *)(uintptr_t)spin, PAGE, PAGE,
							   MREMAP_MAYMOVE | MREMAP_FIXED, room);

	if (moved == MAP_FAILED)
		return 1;
	moved(&sink);
	return 0;
}
