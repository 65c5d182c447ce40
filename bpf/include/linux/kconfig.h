/* Stands in for the kernel's configuration: all that bcc's own header asks about. */
#define CONFIG_BPF_SYSCALL 1
