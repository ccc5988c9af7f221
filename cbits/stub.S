/* SPDX-License-Identifier: MIT */
/*
 * The program that a restored task begins as: it makes the system calls that stand in a list, and nothing else.
 *
 * lazyd executes it under ptrace, with rbx at a list of `struct lz_call` (cbits/lz.h), and lets it run to a breakpoint:
 * at the end of the list (number -1), or behind the first call that failed and may not. It is position independent and
 * uses neither stack nor data: lazyd copies it to where the image has no memory, and it unmaps itself as its last call.
 */
	.globl _start, lz_stub_end
	.text
_start:
	movq (%rbx), %rax
	testq %rax, %rax
	js 3f
	movl %eax, %eax		/* bit 32 of the number: it may fail */
	movq 8(%rbx), %rdi
	movq 16(%rbx), %rsi
	movq 24(%rbx), %rdx
	movq 32(%rbx), %r10
	movq 40(%rbx), %r8
	movq 48(%rbx), %r9
	syscall
	movq %rax, 56(%rbx)
	cmpq $-4095, %rax
	jb 2f
	btq $32, (%rbx)
	jnc 3f
2:	addq $64, %rbx
	jmp _start
3:	int3
lz_stub_end:
	.section .note.GNU-stack, "", @progbits
