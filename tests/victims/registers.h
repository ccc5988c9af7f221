/* SPDX-License-Identifier: MIT */
/* Hold a value in every register and see that it stays: for one .c file of a program. */
#ifndef REGISTERS_H
#define REGISTERS_H

#include <stdint.h>

int registers_stop; /* ends the loop below */

static inline uint64_t registers_has_avx(void)
{
	return __builtin_cpu_supports("avx") ? 1 : 0;
}

/*
 * Put a value of its own into every register, the carry flag and the bytes below the stack pointer, and compare them
 * until registers_stop: returns 0, or the number of what changed. 1 to 14: general registers; 15: the carry flag; 16 to
 * 31: the low half of ymm0 to ymm15, 32 to 47 the high half; 48: below the stack.
 */
uint64_t registers_hold(uint64_t has_avx);
__asm__(".text\n"
	".globl registers_hold\n"
	"registers_hold:\n"
	"	push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
	"	test %rdi, %rdi\n"
	"	mov %rdi, registers_avx(%rip)\n"
	".set i, 0\n"
	".rept 256\n"
	".set i, i + 1\n"
	"	movabs $(0x5eed000000000000 + i), %rax\n"
	"	mov %rax, -8 * i(%rsp)\n"
	".endr\n"
	/* xmm n: n + 1 in both words; the high halves: n + 101 */
	".macro low n\n"
	"	mov $(\\n + 1), %rax; movq %rax, %xmm\\n; punpcklqdq %xmm\\n, %xmm\\n\n"
	".endm\n"
	".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n low \\n\n.endr\n"
	"	cmpq $0, registers_avx(%rip); je 1f\n"
	".macro high n\n"
	"	mov $(\\n + 101), %rax\n"
	"	mov %rax, -2112(%rsp); mov %rax, -2104(%rsp)\n"
	"	vinsertf128 $1, -2112(%rsp), %ymm\\n, %ymm\\n\n"
	".endm\n"
	".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n high \\n\n.endr\n"
	"1:\n"
	"	mov $0x1111, %rbx; mov $0x2222, %rcx; mov $0x3333, %rdx; mov $0x4444, %rsi; mov $0x5555, %rdi\n"
	"	mov $0x6666, %rbp; mov $0x8888, %r8; mov $0x9999, %r9; mov $0xaaaa, %r10; mov $0xbbbb, %r11\n"
	"	mov $0xcccc, %r12; mov $0xdddd, %r13; mov $0xeeee, %r14; mov $0xffff, %r15\n"
	"2:\n"
	".macro same value, register, number\n"
	"	cmp $\\value, %\\register; mov $\\number, %eax; jne 9f\n"
	".endm\n"
	" same 0x1111, rbx, 1\n same 0x2222, rcx, 2\n same 0x3333, rdx, 3\n same 0x4444, rsi, 4\n"
	" same 0x5555, rdi, 5\n same 0x6666, rbp, 6\n same 0x8888, r8, 7\n same 0x9999, r9, 8\n"
	" same 0xaaaa, r10, 9\n same 0xbbbb, r11, 10\n same 0xcccc, r12, 11\n same 0xdddd, r13, 12\n"
	" same 0xeeee, r14, 13\n same 0xffff, r15, 14\n"
	"	stc\n	.rept 64\n	nop\n	.endr\n	mov $15, %eax; jnc 9f\n"
	".macro low_same n\n"
	"	movq %xmm\\n, %rax; cmp $(\\n + 1), %rax; mov $(\\n + 16), %eax; jne 9f\n"
	".endm\n"
	".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n low_same \\n\n.endr\n"
	"	cmpq $0, registers_avx(%rip); je 3f\n"
	".macro high_same n\n"
	"	vextractf128 $1, %ymm\\n, -2112(%rsp)\n"
	"	cmpq $(\\n + 101), -2104(%rsp); mov $(\\n + 32), %eax; jne 9f\n"
	".endm\n"
	".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n high_same \\n\n.endr\n"
	"3:\n"
	".set i, 0\n"
	".rept 256\n"
	".set i, i + 1\n"
	"	movabs $(0x5eed000000000000 + i), %rax; cmp %rax, -8 * i(%rsp); mov $48, %eax; jne 9f\n"
	".endr\n"
	"	cmpl $0, registers_stop(%rip); je 2b\n"
	"	xor %eax, %eax\n"
	"9:\n"
	"	cmpq $0, registers_avx(%rip); je 8f\n"
	"	vzeroupper\n"
	"8:	pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
	"	ret\n"
	".bss\n.balign 16\nregisters_avx: .skip 8\n.text\n");

#endif
