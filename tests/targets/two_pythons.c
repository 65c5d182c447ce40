/* Runs two of Python's libraries in one process: in a thread each, or one inside the other. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

struct python {
	char **arguments; /* the library, and what it runs */
	void (*initialize)(int);
	int (*run)(const char *, void *);
	int (*call_later)(int (*)(void *), void *);
	void *(*save)(void);
	int (*ensure)(void);
};

static void load(struct python *python, char **arguments)
{
	void *library = dlopen(arguments[0], RTLD_NOW | RTLD_LOCAL);

	if (!library) {
		fprintf(stderr, "%s\n", dlerror());
		_exit(1);
	}
	python->arguments = arguments;
	python->initialize = dlsym(library, "Py_InitializeEx");
	python->run = dlsym(library, "PyRun_SimpleStringFlags");
	python->call_later = dlsym(library, "Py_AddPendingCall");
	python->save = dlsym(library, "PyEval_SaveThread");
	python->ensure = dlsym(library, "PyGILState_Ensure");
	python->initialize(0);
}

static int run(void *which)
{
	struct python *python = which;

	return python->run(python->arguments[1], NULL);
}

static void *run_thread(void *which)
{
	struct python *python = which;

	prctl(PR_SET_NAME, python->arguments[2]);
	python->ensure();
	run(python);
	return NULL;
}

/* Arguments: how, and for each its library, its program and its thread's name. */
int main(int count, char **arguments)
{
	struct python pythons[2];
	pthread_t thread;

	if (count != 8)
		return 2;
	for (int i = 0; i < 2; i++)
		load(&pythons[i], arguments + 2 + 3 * i);
	if (!strcmp(arguments[1], "inside")) {
		pythons[0].call_later(run, &pythons[1]);
		return run(&pythons[0]);
	}
	for (int i = 0; i < 2; i++) {
		pythons[i].save();
		pthread_create(&thread, NULL, run_thread, &pythons[i]);
	}
	return pause();
}
