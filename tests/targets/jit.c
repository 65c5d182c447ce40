// Runs code that it has made in anonymous memory: `caller` calls `leaf`, again and again.
//
//   jit none          says nothing about it
//   jit map           writes /tmp/perf-PID.map
//   jit memfd         writes the same map of code in a file in memory, which is mapped twice
//   jit dump FOLDER   writes FOLDER/jit-PID.dump, with lines, and maps it
//
// Prints the addresses of both functions, in hexadecimal, when all is written.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { LEAF_SIZE = 17, CALLER_AT = 64, CALLER_SIZE = 11, PAGE = 4096 };

static const uint8_t leaf_code[LEAF_SIZE] = {
    0x55, 0x48, 0x89, 0xe5,        // push rbp; mov rbp, rsp
    0xb9, 0x00, 0x00, 0x10, 0x00,  // mov ecx, 1 << 20
    0x83, 0xe9, 0x01, 0x75, 0xfb,  // sub ecx, 1; jnz to it
    0x90, 0x5d, 0xc3,              // nop; pop rbp; ret
};

struct header {
  uint32_t magic, version, size, machine, unused, pid;
  uint64_t time_ns, flags;
};

struct prefix {
  uint32_t kind, size;
  uint64_t time_ns;
};

struct load {
  struct prefix prefix;
  uint32_t pid, tid;
  uint64_t address, code_address, code_size, number;
};

struct lines {
  struct prefix prefix;
  uint64_t code_address, count;
};

struct line {
  uint64_t address;
  uint32_t line, discriminator;
};

static uint64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void write_map(uint8_t *code) {
  char path[64];
  snprintf(path, sizeof path, "/tmp/perf-%d.map", getpid());
  FILE *map = fopen(path, "w");
  fprintf(map, "%lx %x made_leaf\n%lx %x made_caller\n", (unsigned long)code, LEAF_SIZE,
          (unsigned long)code + CALLER_AT, CALLER_SIZE);
  fclose(map);
}

static void write_lines(FILE *dump, uint8_t *code, int first_line) {
  const char file[] = "/srv/made.src", same[] = "\xff";
  struct lines lines = {{2, sizeof lines + 2 * sizeof(struct line) + sizeof file + sizeof same,
                         now_ns()}, (uint64_t)code, 2};
  struct line one = {(uint64_t)code, first_line, 0}, other = {(uint64_t)code + 4, first_line + 1, 0};
  fwrite(&lines, sizeof lines, 1, dump);
  fwrite(&one, sizeof one, 1, dump);
  fwrite(file, sizeof file, 1, dump);
  fwrite(&other, sizeof other, 1, dump);
  fwrite(same, sizeof same, 1, dump);
}

static void write_load(FILE *dump, uint8_t *code, const char *name, uint64_t size) {
  uint32_t length = sizeof(struct load) + strlen(name) + 1 + size;
  struct load load = {{0, length, now_ns()}, getpid(), getpid(), (uint64_t)code, (uint64_t)code,
                      size, 1};
  fwrite(&load, sizeof load, 1, dump);
  fwrite(name, strlen(name) + 1, 1, dump);
  fwrite(code, size, 1, dump);
}

static void write_dump(uint8_t *code, const char *folder) {
  char path[4096];
  snprintf(path, sizeof path, "%s/jit-%d.dump", folder, getpid());
  FILE *dump = fopen(path, "w+");
  struct header header = {0x4A695444, 1, sizeof header, 62, 0, getpid(), now_ns(), 0};
  fwrite(&header, sizeof header, 1, dump);
  write_lines(dump, code, 10);
  write_load(dump, code, "dumped_leaf", LEAF_SIZE);
  write_lines(dump, code + CALLER_AT, 20);
  write_load(dump, code + CALLER_AT, "dumped_caller", CALLER_SIZE);
  fflush(dump);
  if (mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, fileno(dump), 0) == MAP_FAILED) exit(1);
}

// Returns memory to write code to, and in `code` where it runs.
static uint8_t *make_room(int is_file, uint8_t **code) {
  int fd = is_file ? memfd_create("doublemapper", MFD_CLOEXEC) : -1;
  if (is_file && ftruncate(fd, PAGE)) exit(1);
  int flags = is_file ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
  *code = mmap(NULL, PAGE, PROT_READ | PROT_EXEC | (is_file ? 0 : PROT_WRITE), flags, fd, 0);
  if (*code == MAP_FAILED) exit(1);
  return is_file ? mmap(NULL, PAGE, PROT_READ | PROT_WRITE, flags, fd, 0) : *code;
}

int main(int argc, char **argv) {
  if (argc < 2) return 1;
  uint8_t *code;
  uint8_t *written = make_room(!strcmp(argv[1], "memfd"), &code);
  if (written == MAP_FAILED) return 1;
  memcpy(written, leaf_code, sizeof leaf_code);
  uint8_t *caller = code + CALLER_AT;
  const uint8_t caller_code[CALLER_SIZE] = {0x55, 0x48, 0x89, 0xe5, 0xe8, 0, 0, 0, 0, 0x5d, 0xc3};
  memcpy(written + CALLER_AT, caller_code, sizeof caller_code);
  int32_t to_leaf = (int32_t)(code - (caller + 9));
  memcpy(written + CALLER_AT + 5, &to_leaf, sizeof to_leaf);
  if (!strcmp(argv[1], "map") || !strcmp(argv[1], "memfd")) write_map(code);
  if (!strcmp(argv[1], "dump") && argc > 2) write_dump(code, argv[2]);
  printf("%lx %lx\n", (unsigned long)code, (unsigned long)caller);
  fflush(stdout);
  for (;;) ((void (*)(void))caller)();
}
