/* Prints the offsets that a layout has, in its words, and from 3.13 on writes the debug offsets. */
#define Py_BUILD_CORE 1
#include <Python.h>
#include <frameobject.h>
#include <stddef.h>
#include <stdio.h>
#include "internal/pycore_pystate.h"
#if PY_MINOR_VERSION >= 9
#include "internal/pycore_interp.h"
#include "internal/pycore_runtime.h"
#endif
#if PY_MINOR_VERSION >= 11
#include "internal/pycore_frame.h"
#endif
#if PY_MINOR_VERSION >= 11
#include "internal/pycore_dict.h"
#include "internal/pycore_moduleobject.h"
#endif
#if PY_MINOR_VERSION >= 13
#include "internal/pycore_ceval.h"
#include "internal/pycore_runtime_init.h"
#endif
#if PY_MINOR_VERSION >= 14
#include "internal/pycore_debug_offsets.h"
#include "internal/pycore_interpframe_structs.h"
#endif

#if PY_MINOR_VERSION <= 11
#define PY_DIGITS ob_digit
#else
#define PY_DIGITS long_value.ob_digit
#endif
#define P(name, value) printf(name " %d\n", (int)(value))
#define W(member) printf("word " #member " %d\n", (int)(offsetof(_Py_DebugOffsets, member) / 8))

int main(int count, char **arguments)
{
	P("version", PY_VERSION_HEX);
#if PY_MINOR_VERSION <= 11
	P("key", offsetof(_PyRuntimeState, gilstate.autoTSSkey));
	P("holder", offsetof(_PyRuntimeState, gilstate.tstate_current));
#endif

	P("state_thread_id", offsetof(PyThreadState, thread_id));
#if PY_MINOR_VERSION <= 10
	P("state_frame", offsetof(PyThreadState, frame));
#elif PY_MINOR_VERSION <= 12
	P("state_frame", offsetof(PyThreadState, cframe));
	P("cframe_frame", offsetof(_PyCFrame, current_frame));
	P("cframe_previous", offsetof(_PyCFrame, previous));
#else
	P("state_frame", offsetof(PyThreadState, current_frame));
#endif
#if PY_MINOR_VERSION == 10
	P("state_cframe", offsetof(PyThreadState, cframe));
	P("cframe_previous", offsetof(CFrame, previous));
#endif

#if PY_MINOR_VERSION <= 10
	P("frame_code", offsetof(PyFrameObject, f_code));
	P("frame_previous", offsetof(PyFrameObject, f_back));
	P("frame_instruction", offsetof(PyFrameObject, f_lasti));
#else
	P("frame_previous", offsetof(_PyInterpreterFrame, previous));
#endif
#if PY_MINOR_VERSION == 11 || PY_MINOR_VERSION == 12
	P("frame_code", offsetof(_PyInterpreterFrame, f_code));
	P("frame_instruction", offsetof(_PyInterpreterFrame, prev_instr));
#elif PY_MINOR_VERSION >= 13
	P("frame_code", offsetof(_PyInterpreterFrame, f_executable));
	P("frame_instruction", offsetof(_PyInterpreterFrame, instr_ptr));
#endif
#if PY_MINOR_VERSION == 11
	P("frame_entry", offsetof(_PyInterpreterFrame, is_entry));
#elif PY_MINOR_VERSION >= 12
	P("frame_entry", offsetof(_PyInterpreterFrame, owner));
#endif
#if PY_MINOR_VERSION == 12 || PY_MINOR_VERSION == 13
	P("entry_least", FRAME_OWNED_BY_CSTACK);
#elif PY_MINOR_VERSION >= 14
	P("entry_least", FRAME_OWNED_BY_INTERPRETER);
#endif

#if PY_MINOR_VERSION <= 10
	P("code_name", offsetof(PyCodeObject, co_name));
#else
	P("code_name", offsetof(PyCodeObject, co_qualname));
	P("code_instructions", offsetof(PyCodeObject, co_code_adaptive));
#endif
	P("code_file", offsetof(PyCodeObject, co_filename));
#if PY_MINOR_VERSION <= 9
	P("code_lines", offsetof(PyCodeObject, co_lnotab));
#else
	P("code_lines", offsetof(PyCodeObject, co_linetable));
#endif
	P("code_first_line", offsetof(PyCodeObject, co_firstlineno));
#if PY_MINOR_VERSION >= 14 && defined(Py_GIL_DISABLED)
	P("frame_tlbc", offsetof(_PyInterpreterFrame, tlbc_index));
	P("code_tlbc", offsetof(PyCodeObject, co_tlbc));
#endif

	P("object_type", offsetof(PyObject, ob_type));
	P("str_length", offsetof(PyASCIIObject, length));
	P("str_state", offsetof(PyASCIIObject, state));
	P("str_ascii", sizeof(PyASCIIObject));
	P("str_compact", sizeof(PyCompactUnicodeObject));
	PyASCIIObject string = { .state = { .kind = 1 } };
	P("str_kind_bit", __builtin_ctz(*(unsigned int *)&string.state));
	P("bytes_size", offsetof(PyVarObject, ob_size));
	P("bytes_data", offsetof(PyBytesObject, ob_sval));

#if PY_MINOR_VERSION <= 13
	P("object interpreters", offsetof(_PyRuntimeState, interpreters.head));
	P("object main_interpreter", offsetof(_PyRuntimeState, interpreters.main));
	P("object next_interpreter", offsetof(PyInterpreterState, next));
#if PY_MINOR_VERSION <= 11
	P("object modules", offsetof(PyInterpreterState, modules));
#else
	P("object modules", offsetof(PyInterpreterState, imports.modules));
#endif
	P("object type", offsetof(PyObject, ob_type));
	P("object type_size", offsetof(PyTypeObject, tp_basicsize));
	P("object type_flags", offsetof(PyTypeObject, tp_flags));
	P("object type_dict_offset", offsetof(PyTypeObject, tp_dictoffset));
	P("object type_keys", offsetof(PyHeapTypeObject, ht_cached_keys));
	P("object dict_keys", offsetof(PyDictObject, ma_keys));
	P("object dict_values", offsetof(PyDictObject, ma_values));
	P("object int_digits", offsetof(PyLongObject, PY_DIGITS));
	P("object int_size", offsetof(PyLongObject, PY_DIGITS) - 8);
	P("object int_digit_bits", PyLong_SHIFT);
#if PY_MINOR_VERSION >= 11
	P("object module_dict", offsetof(PyModuleObject, md_dict));
	P("object keys_size", offsetof(PyDictKeysObject, dk_log2_size));
	P("object keys_index_bytes", offsetof(PyDictKeysObject, dk_log2_index_bytes));
	P("object keys_kind", offsetof(PyDictKeysObject, dk_kind));
	P("object keys_count", offsetof(PyDictKeysObject, dk_nentries));
	P("object keys_header", offsetof(PyDictKeysObject, dk_indices));
	P("object values", offsetof(PyDictValues, values));
#endif
#endif
#if PY_MINOR_VERSION == 13
	W(runtime_state.interpreters_head);
	W(interpreter_state.next);
	W(interpreter_state.imports_modules);
	W(type_object.tp_flags);
	W(dict_object.ma_keys);
	W(dict_object.ma_values);
	W(long_object.lv_tag);
	W(long_object.ob_digit);
#endif

#if PY_MINOR_VERSION >= 13
	W(version);
	W(free_threaded);
	W(thread_state.current_frame);
	W(thread_state.thread_id);
	W(interpreter_frame.previous);
	W(interpreter_frame.executable);
	W(interpreter_frame.instr_ptr);
	W(interpreter_frame.owner);
	W(code_object.filename);
	W(code_object.qualname);
	W(code_object.linetable);
	W(code_object.firstlineno);
	W(code_object.co_code_adaptive);
	W(pyobject.size);
	W(pyobject.ob_type);
	W(bytes_object.ob_size);
	W(bytes_object.ob_sval);
	W(unicode_object.state);
	W(unicode_object.length);
	W(unicode_object.asciiobject_size);
#if PY_MINOR_VERSION >= 14
	W(interpreter_frame.tlbc_index);
	W(code_object.co_tlbc);
	static const union {
		_Py_DebugOffsets offsets;
		char padded[1024];
	} debug = { .offsets = _Py_DebugOffsets_INIT(_Py_Debug_Cookie) };
#else
	static _PyRuntimeState debug = _PyRuntimeState_INIT(debug, _Py_Debug_Cookie);
#endif
	char path[4096];
	snprintf(path, sizeof(path), "%s.offsets", arguments[0]);
	FILE *file = fopen(path, "wb");
	if (!file || fwrite(&debug, 1024, 1, file) != 1 || fclose(file))
		return 1;
#endif
	return count == 0;
}
