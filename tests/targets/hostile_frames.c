/* Behind the source of an imitated interpreter of 3.14: a thread whose frames are as a mode says. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FRAMES 300
#define CODES (1 << 20)
#define MANY_BYTES (1UL << 30)

struct object {
	uint64_t references;
	const void *type;
};
struct frame {
	const void *code;
	const void *previous;
	uint64_t unused[5];
	uint64_t instruction;
	uint8_t unused2[10];
	uint8_t owner;
};
_Static_assert(offsetof(struct frame, owner) == 74, "as the debug offsets say");
struct string {
	struct object head;
	uint64_t length, hash, state;
	char content[1 << 20];
};
struct code {
	struct object head;
	uint8_t unused[52];
	uint32_t first_line;
	uint8_t unused2[40];
	const void *file, *unused3, *name, *lines;
	uint8_t unused4[64];
	uint8_t instructions[8];
};
_Static_assert(offsetof(struct code, first_line) == 68 && offsetof(struct code, file) == 112 &&
	       offsetof(struct code, name) == 128 && offsetof(struct code, instructions) == 208, "");
struct lines {
	struct object head;
	int64_t size;
	uint64_t hash;
	uint8_t content[64];
};

static struct frame frames[FRAMES];
static struct code codes[FRAMES];
static struct string plain, strange[8];
static struct lines lines = { .size = 64 };
static uint64_t thread_state[64];

static uint64_t state_of(int kind, int is_ascii)
{
	return kind << 2 | 1 << 5 | is_ascii << 6;
}

static void set_string(struct string *to, int kind, uint64_t length, const void *content, size_t size)
{
	to->length = length;
	to->state = state_of(kind, 0);
	memcpy(to->content + 16, content, size); /* sizeof(PyCompactUnicodeObject) */
}

static void set_code(struct code *code, const void *name)
{
	code->head.type = PyCode_Type;
	code->first_line = 7;
	code->file = &plain;
	code->name = name;
	code->lines = &lines;
}

static void set_frame(struct frame *frame, struct code *code, const void *previous)
{
	frame->code = code;
	frame->previous = previous;
	frame->instruction = (uint64_t)code->instructions;
}

static void set_names(void)
{
	static const uint16_t surrogates[] = { 0xd800, 'x', 0xdcff, 0x202e, 0xfeff };
	static const uint32_t beyond[] = { 0x110000, 0xffffffff, 0xe0100, 'x' };

	set_string(&strange[0], 1, 20, "a\n\0;\x1b[31m\r\t\x7f\x9b\xff;b;;;x", 20);
	set_string(&strange[1], 2, 5, surrogates, sizeof(surrogates));
	set_string(&strange[2], 4, 4, beyond, sizeof(beyond));
	set_string(&strange[3], 1, 1UL << 62, "long", 4);
	set_string(&strange[4], 4, -1, "negative", 8);
	set_string(&strange[5], 7, 100, "no kind", 7);
	memset(strange[6].content, 'm', sizeof(strange[6].content));
	strange[6].length = sizeof(strange[6].content);
	strange[6].state = state_of(1, 1);
	for (int i = 0; i < 7; i++)
		codes[i].name = &strange[i];
	codes[7].name = (void *)0x1000;
	codes[8].name = (void *)-8;
	codes[9].name = NULL;
}

static void *change(void *nothing)
{
	for (uint32_t n = 0;; n++) {
		struct code *code = &codes[n % FRAMES];

		code->first_line = n;
		code->name = n & 1 ? (const void *)&strange[n % 7] : &plain;
		code->lines = n & 2 ? (const void *)&lines : (void *)0x2000;
		code->head.type = n % 64 ? PyCode_Type : NULL;
	}
	return nothing;
}

/* The thread has other functions all the time. */
static void pass_by(void)
{
	struct code *many = mmap(NULL, CODES * sizeof(*many), PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	for (uint32_t n = 0;; n++) {
		struct code *code = &many[n % CODES];

		set_code(code, &plain);
		code->first_line = n;
		set_frame(&frames[n % FRAMES], code, frames[n % FRAMES].previous);
		for (volatile int i = 0; i < 200; i++)
			;
	}
}

int main(int count, char **arguments)
{
	const char *mode = count > 1 ? arguments[1] : "";
	pthread_t thread;
	struct lines *huge;

	memcpy(plain.content, "plain", 5);
	plain.length = 5;
	plain.state = state_of(1, 1);
	memset(lines.content, 0xf8, sizeof(lines.content));
	for (int i = 0; i < FRAMES; i++) {
		set_code(&codes[i], &plain);
		set_frame(&frames[i], &codes[i], i + 1 < FRAMES ? &frames[i + 1] : NULL);
	}
	frames[FRAMES - 1].owner = 3;
	thread_state[19] = pthread_self(); /* at 152 */
	thread_state[9] = (uint64_t)frames; /* at 72 */
	if (!strcmp(mode, "itself"))
		frames[0].previous = frames;
	else if (!strcmp(mode, "cycle"))
		frames[FRAMES - 1].previous = frames;
	else if (!strcmp(mode, "entries"))
		frames[0].owner = 3, frames[0].previous = frames;
	else if (!strcmp(mode, "nowhere"))
		frames[9].previous = (void *)0x7ffff0000123;
	else if (!strcmp(mode, "no code"))
		frames[9].code = &plain;
	else if (!strcmp(mode, "wild code"))
		frames[9].code = (void *)0x123456789abcdef0;
	else if (!strcmp(mode, "no state"))
		thread_state[19] = 0;
	else if (!strcmp(mode, "wild state"))
		thread_state[9] = -16;
	if (!strcmp(mode, "names") || !strcmp(mode, "changing"))
		set_names();
	if (!strcmp(mode, "lines")) {
		huge = mmap(NULL, MANY_BYTES, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		memset(huge->content, 0xff, 1 << 20);
		huge->size = MANY_BYTES;
		codes[0].lines = huge;
		codes[1].lines = (char *)huge + MANY_BYTES - 40;
		codes[2].lines = NULL;
	}
	set_state(thread_state);
	if (!strcmp(mode, "changing"))
		pthread_create(&thread, NULL, change, NULL);
	if (write(1, "ready\n", 6) != 6)
		return 1;
	if (!strcmp(mode, "passing"))
		pass_by();
	for (;;)
		;
	return _PyEval_EvalFrameDefault(0);
}
