/* many_mappings FILE EXECUTABLE OTHER: map a file so often executable, so often not, and wait.
 *
 * "ready" is written in between and answered by a byte: a sixteenth is mapped before.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static char *next = (char *)0x100000000000;

static void map(int fd, long count, int prot)
{
    for (long i = 0; i < count; i++, next += 8192)
        if (mmap(next, 4096, prot, MAP_PRIVATE | MAP_FIXED, fd, 0) == MAP_FAILED)
            _exit(2);
}

int main(int argc, char **argv)
{
    int fd = open(argv[1], O_RDONLY);
    long executable = atol(argv[2]), other = atol(argv[3]);
    char byte;
    map(fd, executable / 16, PROT_READ | PROT_EXEC);
    puts("ready"), fflush(stdout);
    if (read(0, &byte, 1) != 1)
        return 0;
    map(fd, executable - executable / 16, PROT_READ | PROT_EXEC);
    map(fd, other, PROT_READ);
    puts("done"), fflush(stdout);
    return (int)read(0, &byte, 1);
}
