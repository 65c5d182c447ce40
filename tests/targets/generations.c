/* A process that forks, execs and maps on command: one command a line, answered by its pid.
 *
 *   hello                  nothing
 *   map FILE ADDRESS       map a file executable at a fixed address, over what is there
 *   remap FILE ADDRESS N   the same N times, with two pages of it in turn
 *   exec FILE              start another program, with the argument 60
 *   thread-exec FILE       the same from a second thread
 *   become-child           fork; the child goes on reading commands, the parent exits
 *   leave-to-thread        a second thread goes on reading commands, the first one exits
 *   fork                   fork a child that waits; answers with its pid
 *   spawn-as PID FILE      fork a child with a chosen pid that starts a program; waits for it
 *
 * It ends with its input.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/sched.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static char line[4200], file[4200];

static void answer(int pid)
{
    char text[32];
    int size = snprintf(text, sizeof(text), "%d\n", pid);
    if (write(1, text, size) != size)
        _exit(1);
}

static int read_line(void)
{
    size_t size = 0;
    while (size < sizeof(line) - 1 && read(0, line + size, 1) == 1) {
        if (line[size] == '\n') {
            line[size] = 0;
            return 1;
        }
        size++;
    }
    return 0;
}

static void map(unsigned long address, int page)
{
    int fd = open(file, O_RDONLY);
    if (mmap((void *)address, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, fd,
             page * 4096L) == MAP_FAILED)
        _exit(2);
    close(fd);
}

static void *start(void *unused)
{
    execl(file, file, "60", NULL);
    _exit(3);
    return unused;
}

static void spawn_as(int pid)
{
    pid_t wanted = pid;
    struct clone_args args = {.exit_signal = SIGCHLD};
    args.set_tid = (unsigned long)&wanted;
    args.set_tid_size = 1;
    long child = syscall(SYS_clone3, &args, sizeof(args));
    if (child < 0)
        _exit(4);
    if (child == 0) {
        execl(file, file, NULL);
        _exit(5);
    }
    waitpid(child, NULL, 0);
    answer(child);
}

static void *serve(void *first)
{
    pthread_t thread, self = pthread_self();
    unsigned long address;
    int number;
    if (first) {
        pthread_join(*(pthread_t *)first, NULL);
        answer(getpid());
    }
    while (read_line()) {
        if (sscanf(line, "map %s %lx", file, &address) == 2) {
            map(address, 0);
        } else if (sscanf(line, "remap %s %lx %d", file, &address, &number) == 3) {
            while (number-- > 0)
                map(address, number % 2);
        } else if (sscanf(line, "exec %s", file) == 1) {
            start(NULL);
        } else if (sscanf(line, "thread-exec %s", file) == 1) {
            pthread_create(&thread, NULL, start, NULL);
            pause();
        } else if (sscanf(line, "spawn-as %d %s", &number, file) == 2) {
            spawn_as(number);
            continue;
        } else if (strcmp(line, "become-child") == 0) {
            if (fork())
                _exit(0);
        } else if (strcmp(line, "leave-to-thread") == 0) {
            static pthread_t leaver;
            leaver = self;
            pthread_create(&thread, NULL, serve, &leaver);
            pthread_exit(NULL);
        } else if (strcmp(line, "fork") == 0) {
            int parent = getpid(), child = fork();
            if (child == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                while (getppid() == parent)
                    pause();
                _exit(0);
            }
            answer(child);
            continue;
        }
        answer(getpid());
    }
    _exit(0);
}

int main(void)
{
    serve(NULL);
}
