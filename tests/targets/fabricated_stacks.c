/*
 * Runs in anonymous memory, above a chain of frame pointers over 254 return addresses that lie in no
 * mapping and are chosen anew all the time.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
static uint64_t x = 88172645463325252ULL;
static uint64_t next(void) { x ^= x << 13; x ^= x >> 7; x ^= x << 17; return x; }
int main(void) {
  enum { N = 254 };
  size_t size = 1 << 20;
  uint64_t base = 0x123400000000ULL, stack[2 * N + 2];
  unsigned char code[] = {0x55, 0x48, 0x89, 0xfd, 0x48, 0xff, 0xce, 0x75, 0xfb, 0x5d, 0xc3};
  unsigned char *area = mmap(0, size, PROT_READ | PROT_WRITE | PROT_EXEC,
                             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memcpy(area, code, sizeof(code));
  puts("there"); fflush(stdout);
  for (;;) {
    for (int i = 0; i < N; i++) {
      stack[2 * i] = (uint64_t)&stack[2 * i + 2];
      stack[2 * i + 1] = base + next() % size;
    }
    stack[2 * N] = stack[2 * N + 1] = 0;
    ((void (*)(uint64_t *, uint64_t))area)(stack, 100000);
  }
}
