/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The chain of interpreter frames of the current thread: CPython's own stack, which does not lie on the
 * thread's. Layouts of its structures in, tagged words out, innermost frame first, behind the words of
 * the native walk:
 *
 *     TAG_PYTHON | code object    a function: checksum of the code object << 32 | its instruction
 *     TAG_ALONE | code object     the same, and it is all of an evaluation (CPython up to 3.10)
 *     TAG_ENTRY | address         the end of an evaluation; the address lies in the native frame of
 *                                 the function that evaluates, so that user space finds the place
 *     TAG_DETACHED                before frames of TAG_ALONE: the thread may have others further in
 *     TAG_REASON | reason         why the chain is not whole, at its end
 *
 * A frame takes two reads of the process's memory: the frame, and the code object, whose type is checked
 * and whose checksum tells it from another one that is at the same address later. The content of a code
 * object that was not seen before is sent to user space, which names it: the process may be gone soon.
 *
 * What it takes from the file that includes it: lookup_interpreter(number), lookup_seen(place).
 * -D constants: INTERPRETER_SIZE, TAG_*, CHAIN_*, STYLE_*, STATE_*, ABSENT, SEEN_PLACES, NEW_CODES.
 */
#ifndef EVERFLAME_CHAIN_BPF_H
#define EVERFLAME_CHAIN_BPF_H

#include "frame.bpf.h"

/* glibc's struct pthread: the first 32 keys of a thread, each a sequence number and a value. */
#define PTHREAD_KEYS_OFFSET 0x310
#define PTHREAD_KEYS 32
#define PTHREAD_KEY_SIZE 16
/* glibc's dtv_t, and where the thread control block has the vector of them (TLS ABI, variant II). */
#define DTV_OFFSET 8
#define DTV_SIZE 16
#define DTV_UNALLOCATED (~0ULL)
#define MAX_MODULES 4096

#define FRAME_WORDS_READ 16
#define CODE_WORDS_READ 32
/* Of a code object in all versions, behind its header: they stay as they are, but for the 4 bytes behind
 * its flags. */
#define CODE_WORDS_COMMON 14
#define CODE_FLAGS 32
#define POINTER_BITS ((1ULL << TAG_SHIFT) - 8) /* without the tag bits of references (CPython 3.14) */

/* Where a thread has the pointer to its state; addresses as linked. */
struct state_place {
	u64 address;
	s32 offset;
	u32 kind;
};

/* Where in CPython's structures what stands, in bytes; ABSENT where a version has it not. */
struct interpreter {
	struct state_place state;
	struct state_place detached; /* while the thread has no interpreter's lock */
	u64 code_type; /* the type of all code objects; as linked */

	u16 style;
	u16 state_thread_id;
	u16 state_frame; /* of the innermost frame, or of the C frame that has it */
	u16 cframe_frame;
	u16 cframe_previous;
	u16 frame_bytes;
	u16 frame_code;
	u16 frame_previous;
	u16 frame_instruction;
	u16 frame_entry;
	u16 entry_least;
	u16 frame_tlbc;
	u16 code_tlbc;
	u16 code_bytes;
	u16 code_instructions;
	u16 object_type;
	u16 code_name;
	u16 code_file;
	u16 code_lines;
	u16 code_first_line;
	u16 str_length;
	u16 str_state;
	u16 str_kind_bit;
	u16 str_ascii;
	u16 str_compact;
	u16 bytes_size;
	u16 bytes_data;
	u16 unused[5];
};
_Static_assert(sizeof(struct interpreter) == INTERPRETER_SIZE, "interpreters.py: INTERPRETER");

struct chain {
	u64 frame; /* the next one */
	u64 cframe;
	u64 hash; /* of the words */
	u64 identity; /* of the process generation, for a minute */
	u32 programs; /* how many have read it; 0: nobody has begun */
	u32 found; /* code objects that are new */
	u32 sent;
	u32 unused;
	u64 codes[NEW_CODES];
	u32 checksums[NEW_CODES];
	u64 frame_words[FRAME_WORDS_READ];
	u64 code_words[CODE_WORDS_READ];
};

static __always_inline struct interpreter *lookup_interpreter(u32 number);
static __always_inline u64 *lookup_seen(u32 place);

static __always_inline u64 word_of(const u64 *words, u32 offset, u32 mask)
{
	u32 place = offset >> 3;

	asm volatile("" : "+r"(place)); /* keeps the bound visible to the verifier */
	return words[place & mask];
}

static __always_inline u64 frame_word(const struct chain *chain, u32 offset)
{
	return word_of(chain->frame_words, offset, FRAME_WORDS_READ - 1);
}

static __always_inline u64 code_word(const struct chain *chain, u32 offset)
{
	return word_of(chain->code_words, offset, CODE_WORDS_READ - 1);
}

/* The bytes from an offset on, the lowest first. */
static __always_inline u64 frame_bytes_at(const struct chain *chain, u32 offset)
{
	return frame_word(chain, offset) >> ((offset & 7) * 8);
}

static __always_inline long read_pointer(u64 *to, u64 address)
{
	return read_user(to, sizeof(*to), (const void *)address);
}

/* Where a thread has the pointer to its state; 0 if nowhere. */
static __always_inline u64 find_place(const struct state_place *place, u64 bias, u64 thread)
{
	u64 value = 0, vector = 0, block = 0, at = place->address + bias;

	switch (place->kind) {
	case STATE_STATIC_TLS:
		return thread + (s64)place->offset;
	case STATE_GOT_TLS:
		if (read_pointer(&value, at))
			return 0;
		return thread + value + (s64)place->offset;
	case STATE_KEY:
		if (read_user(&value, sizeof(u32), (const void *)at) || value >= PTHREAD_KEYS)
			return 0;
		return thread + PTHREAD_KEYS_OFFSET + value * PTHREAD_KEY_SIZE + 8;
	case STATE_DYNAMIC_TLS:
		if (read_pointer(&value, at) || value >= MAX_MODULES ||
		    read_pointer(&vector, thread + DTV_OFFSET) ||
		    read_pointer(&block, vector + value * DTV_SIZE) || block == DTV_UNALLOCATED)
			return 0;
		return block + (s64)place->offset;
	case STATE_HOLDER:
		return at;
	}
	return 0;
}

static __always_inline u32 push_word(struct user_stack *stack, struct chain *chain, u64 word)
{
	u32 length = stack->length;

	asm volatile("" : "+r"(length)); /* keeps the bound visible to the verifier */
	if (length >= MAX_USER_WORDS)
		return CHAIN_TRUNCATED;
	stack->words[length] = word;
	stack->length = length + 1;
	chain->hash = mix(chain->hash, word);
	return GO_ON;
}

/* Find the innermost frame: GO_ON, or why there is none. */
static __always_inline u32 begin_chain(struct chain *chain, struct user_stack *stack,
				       const struct walk *walk, const struct interpreter *layout,
				       u64 thread)
{
	u64 at = find_place(&layout->state, walk->runtime.bias, thread), state = 0, owner = 0;
	bool is_detached = false;

	chain->programs = 1;
	chain->frame = 0;
	if (at && read_pointer(&state, at))
		return CHAIN_NO_STATE;
	if (state && layout->state.kind == STATE_HOLDER &&
	    (read_pointer(&owner, state + layout->state_thread_id) || owner != thread))
		state = 0; /* of the thread that has the lock now */
	if (!state) {
		is_detached = true;
		at = find_place(&layout->detached, walk->runtime.bias, thread);
		if (at && read_pointer(&state, at))
			return CHAIN_NO_STATE;
	}
	if (!state) /* a thread that runs no Python */
		return at ? CHAIN_NO_PYTHON : CHAIN_NO_STATE;
	if (read_pointer(&owner, state + layout->state_thread_id) ||
	    read_pointer(&chain->frame, state + layout->state_frame))
		return CHAIN_UNREADABLE;
	if (owner != thread)
		return CHAIN_OTHER_THREAD;
	if (layout->cframe_frame != ABSENT) {
		chain->cframe = chain->frame;
		if (!chain->cframe ||
		    read_pointer(&chain->frame, chain->cframe + layout->cframe_frame))
			return CHAIN_UNREADABLE;
	}
	if (!chain->frame)
		return CHAIN_NO_PYTHON;
	if (is_detached && layout->style == STYLE_FRAME_PER_CALL)
		return push_word(stack, chain, (u64)TAG_DETACHED << TAG_SHIFT);
	return GO_ON;
}

/*
 * What tells a code object from another one that is at its address at another time. The allocator hands
 * out the same memory again, so functions that a program makes, runs and drops one after the other have
 * most pointers in common: all members count, from the object's header to the line table. From 3.12 on
 * one of them is the number of the code object. Half a word changes in 3.11: it counts the calls.
 */
static __always_inline u32 checksum_of(const struct chain *chain, const struct interpreter *layout)
{
	u32 first = layout->object_type + 8;
	u64 hash = (u32)code_word(chain, first + CODE_FLAGS);

	for (u32 i = 0; i < CODE_WORDS_COMMON; i++)
		if (i != CODE_FLAGS / 8)
			hash = mix(hash, code_word(chain, first + 8 * i));
	hash = mix(hash, code_word(chain, layout->code_name));
	hash = mix(hash, code_word(chain, layout->code_lines));
	return hash ^ hash >> 32;
}

static __always_inline u64 key_of_code(const struct chain *chain, u64 code, u32 checksum)
{
	return mix(mix(chain->identity, code), checksum);
}

/* Note a code object that nobody has seen yet, so that its content is sent. */
static __always_inline void note_code(struct chain *chain, u64 code, u32 checksum)
{
	u64 key = key_of_code(chain, code, checksum);
	u64 *seen = lookup_seen(key % SEEN_PLACES);
	u32 found = chain->found;

	if (!seen || likely(*seen == key) || found >= NEW_CODES)
		return;
	*seen = key;
	asm volatile("" : "+r"(found)); /* keeps the bound visible to the verifier */
	found &= NEW_CODES - 1;
	chain->codes[found] = code;
	chain->checksums[found] = checksum;
	chain->found = found + 1;
}

/* Which instruction a frame is at, counted from the first of its code. */
static __always_inline u32 instruction_of(const struct chain *chain, const struct interpreter *layout,
					  u64 code)
{
	u64 start = code + layout->code_instructions, array, place;

	if (layout->code_instructions == ABSENT)
		return frame_bytes_at(chain, layout->frame_instruction);
	if (layout->frame_tlbc != ABSENT) { /* each thread may have a copy of the instructions */
		place = (u32)frame_bytes_at(chain, layout->frame_tlbc);
		array = code_word(chain, layout->code_tlbc);
		if (place && read_pointer(&start, array + 8 + place * 8))
			return ~0U;
	}
	return frame_word(chain, layout->frame_instruction) - start;
}

/* Put the next frame into words: GO_ON, or why there are no more. */
static __always_inline u32 leave_interpreter_frame(struct chain *chain, struct user_stack *stack,
						   const struct interpreter *layout, u64 code_type)
{
	u64 code, previous, tag = TAG_PYTHON, at = chain->frame;
	u32 size = layout->frame_bytes, checksum;
	u8 entry = 0;

	asm volatile("" : "+r"(size));
	size &= sizeof(chain->frame_words) - 1;
	if (read_user(chain->frame_words, size, (const void *)at))
		return CHAIN_UNREADABLE;
	previous = frame_word(chain, layout->frame_previous);
	if (layout->frame_entry != ABSENT)
		entry = frame_bytes_at(chain, layout->frame_entry);
	chain->frame = previous;
	if (layout->style == STYLE_ENTRY_FRAME && entry >= layout->entry_least) {
		if (push_word(stack, chain, (u64)TAG_ENTRY << TAG_SHIFT | at) != GO_ON)
			return CHAIN_TRUNCATED;
		return previous ? GO_ON : CHAIN_WHOLE;
	}
	code = frame_word(chain, layout->frame_code) & POINTER_BITS;
	size = layout->code_bytes;
	asm volatile("" : "+r"(size));
	size &= sizeof(chain->code_words) - 1;
	if (read_user(chain->code_words, size, (const void *)code))
		return CHAIN_UNREADABLE;
	if (code_word(chain, layout->object_type) != code_type)
		return CHAIN_NO_CODE;
	if (layout->style == STYLE_FRAME_PER_CALL)
		tag = TAG_ALONE;
	checksum = checksum_of(chain, layout);
	if (stack->length >= MAX_USER_WORDS - 2)
		return CHAIN_TRUNCATED;
	push_word(stack, chain, tag << TAG_SHIFT | code);
	push_word(stack, chain, (u64)checksum << 32 | instruction_of(chain, layout, code));
	note_code(chain, code, checksum);
	if (layout->style == STYLE_ENTRY_FLAG && entry >= layout->entry_least) {
		if (push_word(stack, chain, (u64)TAG_ENTRY << TAG_SHIFT | chain->cframe) != GO_ON)
			return CHAIN_TRUNCATED;
		if (previous && read_pointer(&chain->cframe, chain->cframe + layout->cframe_previous))
			return CHAIN_UNREADABLE;
	}
	return previous ? GO_ON : CHAIN_WHOLE;
}

/* The last word of a chain that is not whole. */
static __always_inline void end_chain(struct chain *chain, struct user_stack *stack, u32 why)
{
	if (why == CHAIN_WHOLE)
		return;
	if (stack->length >= MAX_USER_WORDS)
		stack->length = MAX_USER_WORDS - 1; /* a word of a frame that is not there as a whole */
	push_word(stack, chain, (u64)TAG_REASON << TAG_SHIFT | why);
}

/*
 * A code object as it was when it was first seen: what stands in memory, one after the other. The
 * parser in user space knows what each piece means.
 */
struct code_record {
	u64 start_ns;
	u64 exec_id;
	u64 cgroup_id;
	u64 code;
	u32 pid;
	u32 interpreter;
	u32 checksum;
	u16 sizes[4]; /* of the code object, its name, its file's name, and its line table */
	u32 unused2;
	u8 content[CODE_CONTENT + 2 * CODE_PIECE];
};
#define CODE_HEAD (__builtin_offsetof(struct code_record, content))
_Static_assert(CODE_HEAD == CODE_RECORD_SIZE, "interpreters.py: CODE_RECORD");

/* Append so many bytes, CODE_PIECE at most; return how many these are, 0 if they are unreadable. */
static __always_inline u32 append_piece(struct code_record *record, u32 offset, u64 from, u32 size)
{
	asm volatile("" : "+r"(offset), "+r"(size)); /* keeps the bounds visible to the verifier */
	offset &= CODE_CONTENT - 1;
	size &= 2 * CODE_PIECE - 1;
	if (size > CODE_PIECE)
		size = CODE_PIECE;
	if (!from || read_user(record->content + offset, size, (const void *)from))
		return 0;
	return size;
}

/* How large a string is, with its header (PEP 393); 0 if it cannot be read. */
static __always_inline u32 size_of_string(const struct interpreter *layout, u64 string)
{
	u64 length = 0;
	u32 state = 0, kind, header;

	if (!string || read_pointer(&length, string + layout->str_length) ||
	    read_user(&state, sizeof(state), (const void *)(string + layout->str_state)))
		return 0;
	kind = state >> (layout->str_kind_bit & 31) & 7;
	header = state >> ((layout->str_kind_bit + 4) & 31) & 1 ? layout->str_ascii
								  : layout->str_compact;
	if (length > CODE_STRING)
		length = CODE_STRING;
	length = header + length * kind;
	return length > CODE_STRING ? CODE_STRING : length;
}

static __always_inline u32 size_of_bytes(const struct interpreter *layout, u64 bytes)
{
	u64 size = 0;

	if (!bytes || read_pointer(&size, bytes + layout->bytes_size))
		return 0;
	return size > CODE_PIECE - layout->bytes_data ? CODE_PIECE : size + layout->bytes_data;
}

/* Fill in what is read of a code object; return the size of the record. */
static __always_inline u32 read_code(struct code_record *record, const struct interpreter *layout,
				     u64 code)
{
	u64 name = 0, file = 0, lines = 0;
	u32 offset;

	record->code = code;
	record->sizes[0] = append_piece(record, 0, code, layout->code_bytes);
	offset = record->sizes[0];
	read_pointer(&name, code + layout->code_name);
	record->sizes[1] = append_piece(record, offset, name, size_of_string(layout, name));
	offset += record->sizes[1];
	read_pointer(&file, code + layout->code_file);
	record->sizes[2] = append_piece(record, offset, file, size_of_string(layout, file));
	offset += record->sizes[2];
	read_pointer(&lines, code + layout->code_lines);
	record->sizes[3] = append_piece(record, offset, lines, size_of_bytes(layout, lines));
	return CODE_HEAD + offset + record->sizes[3];
}

#endif
