// SPDX-License-Identifier: MIT
/*
 * Make the process that is to become a task: under its old pid, with its open files under their old numbers, and
 * waiting for a tracer before it executes anything.
 *
 * clone3(2) takes the pid (set_tid; Linux 5.5, CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN in the pid namespace). A process
 * in between forks it and ends, so that the task is nobody's child whom it does not know: who adopts orphans adopts it.
 * Until its tracer has it, it waits at a pipe: if the tracer dies, the pipe ends, and so does it. Then the tracer's
 * PTRACE_O_EXITKILL sees to that.
 *
 * The child shares nothing with us and makes only system calls: it is forked from a program that may have locks.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "lz.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void close_between(unsigned int first, unsigned int last)
{
	if (first <= last)
		syscall(SYS_close_range, first, last, 0);
}

/* Give the open files their numbers: sources first out of the way of all targets. */
static int place_files(struct lz_placed_file *files, size_t count, int program, int *placed_program)
{
	int above = 2;

	for (size_t i = 0; i < count; i++)
		if (files[i].target > above)
			above = files[i].target;
	above++;
	*placed_program = fcntl(program, F_DUPFD_CLOEXEC, above);
	if (*placed_program < 0)
		return -errno;
	for (size_t i = 0; i < count; i++) {
		files[i].source = fcntl(files[i].source, F_DUPFD, above);
		if (files[i].source < 0)
			return -errno;
	}
	unsigned int next = 0; /* targets are sorted */
	for (size_t i = 0; i < count; i++) {
		if (files[i].target > 0)
			close_between(next, (unsigned int)files[i].target - 1);
		if (dup2(files[i].source, files[i].target) < 0)
			return -errno;
		next = (unsigned int)files[i].target + 1;
	}
	if (*placed_program > 0)
		close_between(next, (unsigned int)*placed_program - 1);
	close_between((unsigned int)*placed_program + 1, ~0U);
	return 0;
}

/* 126: its files do not fit; 127: the program cannot be executed. */
static void become_stub(const struct lz_spawn *spawn, int go)
{
	struct rlimit limit;
	char byte = 0, *nothing[] = { NULL };
	int program;
	sigset_t none;

	if (read(go, &byte, 1) != 1)
		_exit(125);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	if (spawn->new_session)
		setsid();
	else if (spawn->new_group)
		setpgid(0, 0);
	if (!getrlimit(RLIMIT_NOFILE, &limit)) {
		limit.rlim_cur = limit.rlim_max;
		setrlimit(RLIMIT_NOFILE, &limit);
	}
	if (place_files(spawn->files, spawn->file_count, spawn->program, &program))
		_exit(126);
	syscall(SYS_execveat, program, "", nothing, nothing, AT_EMPTY_PATH);
	_exit(127);
}

int lz_spawn_stub(const struct lz_spawn *spawn, int *go)
{
	int answer[2], begin[2], status, result = -EIO;

	if (pipe2(begin, O_CLOEXEC))
		return -errno;
	if (pipe2(answer, O_CLOEXEC)) {
		result = -errno;
		close(begin[0]), close(begin[1]);
		return result;
	}
	pid_t between = fork();
	if (between < 0)
		result = -errno;
	if (between == 0) {
		pid_t pid = spawn->pid;
		struct clone_args args = {
			.exit_signal = SIGCHLD,
			.set_tid = (uint64_t)(uintptr_t)&pid,
			.set_tid_size = 1,
		};
		long child = syscall(SYS_clone3, &args, sizeof(args));

		result = child < 0 ? -errno : 0;
		if (child == 0) {
			close(begin[1]);
			become_stub(spawn, begin[0]);
		}
		if (write(answer[1], &result, sizeof(result)) != sizeof(result))
			_exit(1);
		_exit(0);
	}
	close(answer[1]);
	close(begin[0]);
	if (between > 0) {
		if (read(answer[0], &result, sizeof(result)) != sizeof(result))
			result = -EIO;
		while (waitpid(between, &status, 0) < 0 && errno == EINTR)
			;
	}
	close(answer[0]);
	if (result < 0)
		close(begin[1]);
	else
		*go = begin[1];
	return result;
}
