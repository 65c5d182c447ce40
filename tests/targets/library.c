/* One function that spends time, under a name of the compiler's command line (-DNAME=...). */
#include <stdint.h>

static volatile uint64_t sink;

void NAME(uint64_t rounds)
{
	sink += !__builtin_frame_address(0); /* a leaf gets no frame otherwise */
	for (uint64_t i = 0; i < rounds; i++)
		sink += i * 3;
}
