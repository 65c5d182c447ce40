/*
 * A program that does little but let the dynamic linker bind its calls of 256 functions, which are in
 * the same source's library: it puts the slots of its PLT back to what they were before any call. Long
 * names keep it below the code that saves all registers.
 */
#define REPEATED(name, n) name##name##name##name##n
#define NAME(n) REPEATED(function_whose_name_takes_long_to_hash_and_to_compare_, n)
#define F4(n) F(n##0) F(n##1) F(n##2) F(n##3)
#define F16(n) F4(n##0) F4(n##1) F4(n##2) F4(n##3)
#define F64(n) F16(n##0) F16(n##1) F16(n##2) F16(n##3)
#define F256 F64(0) F64(1) F64(2) F64(3)

#ifdef LIBRARY
volatile long calls;
#define F(n) void NAME(n)(void) { calls++; }
F256
#else
#define F(n) void NAME(n)(void);
F256
#undef F
#define F(n) NAME(n)();

extern void *volatile _GLOBAL_OFFSET_TABLE_[] __attribute__((visibility("hidden")));
enum { FIRST = 3, SLOTS = 256 };

int main(void)
{
	static void *volatile unbound[SLOTS];

	for (int i = 0; i < SLOTS; i++)
		unbound[i] = _GLOBAL_OFFSET_TABLE_[FIRST + i];
	for (;;) {
		F256
		for (int i = 0; i < SLOTS; i++)
			_GLOBAL_OFFSET_TABLE_[FIRST + i] = unbound[i];
	}
}
#endif
