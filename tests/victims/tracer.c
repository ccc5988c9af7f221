/* SPDX-License-Identifier: MIT */
/*
 * What strace does: tracer PID LOG
 *
 * It seizes every thread of a process, says "tracing" on its standard output, and writes a line to LOG for each system
 * call that a thread begins ("> TID NUMBER") or ends ("< TID RESULT"), and for each signal ("! TID NUMBER"). At SIGINT
 * it lets the process go, as it was, and ends.
 */
#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <linux/ptrace.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOST_THREADS 256
#define SYSCALL_STOP (SIGTRAP | 0x80)

long ptrace(int request, pid_t pid, void *address, void *data);

static volatile sig_atomic_t asked_to_end;

static void ask_to_end(int number)
{
	(void)number;
	asked_to_end = 1;
}

static void require(bool condition, const char *what)
{
	if (!condition) {
		fprintf(stderr, "tracer: %s: %s\n", what, strerror(errno));
		exit(1);
	}
}

/* Writes down what a thread has stopped for; returns the signal that it is to get. */
static int note(FILE *log, pid_t tid, int status)
{
	struct ptrace_syscall_info info = { 0 };
	int number = WSTOPSIG(status);

	if (status >> 16)
		return 0; /* an event: it was seized, or is to be let go */
	if (number != SYSCALL_STOP) {
		fprintf(log, "! %d %d\n", tid, number);
		return number;
	}
	require(ptrace(PTRACE_GET_SYSCALL_INFO, tid, (void *)sizeof(info), &info) > 0, "system call");
	if (info.op == PTRACE_SYSCALL_INFO_ENTRY)
		fprintf(log, "> %d %llu\n", tid, (unsigned long long)info.entry.nr);
	else
		fprintf(log, "< %d %lld\n", tid, (long long)info.exit.rval);
	return 0;
}

int main(int argc, char **argv)
{
	pid_t tids[MOST_THREADS];
	size_t count = 0, left;
	char path[64];
	int status;

	if (argc != 3)
		return 2;
	FILE *log = fopen(argv[2], "w");
	require(log, argv[2]);
	/* Without SA_RESTART: a wait has to hear of it. */
	require(!sigaction(SIGINT, &(struct sigaction){ .sa_handler = ask_to_end }, NULL), "sigaction");
	snprintf(path, sizeof(path), "/proc/%d/task", atoi(argv[1]));
	DIR *tasks = opendir(path);
	require(tasks, path);
	for (struct dirent *one; (one = readdir(tasks));) {
		if (one->d_name[0] == '.')
			continue;
		require(count < MOST_THREADS, "too many threads");
		tids[count] = atoi(one->d_name);
		require(!ptrace(PTRACE_SEIZE, tids[count], NULL, (void *)PTRACE_O_TRACESYSGOOD), "seize");
		require(!ptrace(PTRACE_INTERRUPT, tids[count], NULL, NULL), "interrupt");
		count++;
	}
	closedir(tasks);
	puts("tracing");
	fflush(stdout);
	for (bool ending = false; count;) {
		if (asked_to_end && !ending) {
			ending = true;
			for (size_t i = 0; i < count; i++)
				ptrace(PTRACE_INTERRUPT, tids[i], NULL, NULL);
		}
		pid_t tid = waitpid(-1, &status, __WALL);
		if (tid < 0) {
			require(errno == EINTR, "waitpid");
			continue;
		}
		left = count;
		for (size_t i = 0; i < count; i++)
			if (tids[i] == tid && (!WIFSTOPPED(status) || ending))
				tids[i] = tids[--count];
		if (!WIFSTOPPED(status))
			continue;
		void *number = (void *)(long)note(log, tid, status);
		require(!ptrace(left > count ? PTRACE_DETACH : PTRACE_SYSCALL, tid, NULL, number) || errno == ESRCH,
			"go on");
	}
	return fclose(log) ? 1 : 0;
}
