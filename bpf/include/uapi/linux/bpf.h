/* bcc force-includes a bpf.h of its own; what is missing there is the context of a perf event. */
#ifndef EVERFLAME_UAPI_BPF_H
#define EVERFLAME_UAPI_BPF_H
/* x86-64 order, as in the kernel's arch/x86/include/asm/ptrace.h: user space depends on it. */
struct pt_regs {
	unsigned long r15, r14, r13, r12, bp, bx;
	unsigned long r11, r10, r9, r8, ax, cx, dx, si, di;
	unsigned long orig_ax, ip, cs, flags, sp, ss;
};
struct bpf_perf_event_data {
	struct pt_regs regs;
	unsigned long long sample_period;
	unsigned long long addr;
};
#endif
