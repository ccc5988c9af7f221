/* SPDX-License-Identifier: MIT */
/*
 * A plain task with much of everything that images of one hold: plain DIR THREADS [user]
 *
 * It sets itself up, writes down what it can find out about itself, creates DIR/ready and waits for DIR/go. Then it
 * writes the same down again and compares, checks every byte of its memory, and writes one line to DIR/result: "ok",
 * or the first thing that differs. With `user` it gives up root first.
 */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "registers.h"

#define PAGE 4096UL
#define MANY 100000 /* seconds: timers that do not fire, and whose rest is compared in units of 10,000 */

static char dir[1024];
static int result_fd;
static char **command_line;

static void end(const char *line)
{
	/* Open since the start, and by another name until it says something: whoever waits for it may remove it. */
	if (write(result_fd, line, strlen(line)) < 0 || rename("unfinished", "result"))
		_exit(4);
	_exit(strcmp(line, "ok\n") ? 1 : 0);
}

__attribute__((format(printf, 1, 2))) static void fail(const char *format, ...)
{
	char text[700];
	va_list args;
	va_start(args, format);
	vsnprintf(text, sizeof(text) - 1, format, args);
	va_end(args);
	strcat(text, "\n");
	end(text);
}

#define NEED(condition)                                                                                                \
	do {                                                                                                           \
		if (!(condition))                                                                                      \
			fail("line %d: %s: %s", __LINE__, #condition, strerror(errno));                                \
	} while (0)

/* ---- what it knows about itself: lines of text ---- */

struct lines {
	char text[32768];
	size_t length;
};

__attribute__((format(printf, 2, 3))) static void note(struct lines *lines, const char *format, ...)
{
	va_list args;
	va_start(args, format);
	int length = vsnprintf(lines->text + lines->length, sizeof(lines->text) - lines->length, format, args);
	va_end(args);
	lines->length += (size_t)length;
	if (lines->length >= sizeof(lines->text) - 1)
		fail("too much to write down");
}

static void compare(const char *who, const struct lines *before, const struct lines *after)
{
	const char *a = before->text, *b = after->text;
	while (*a || *b) {
		size_t m = strcspn(a, "\n"), n = strcspn(b, "\n");
		if (m != n || memcmp(a, b, m))
			fail("%s: was %.*s, is %.*s", who, (int)m, a, (int)n, b);
		a += m + (a[m] == '\n');
		b += n + (b[n] == '\n');
	}
}

static void note_mask(struct lines *lines, const char *name, const sigset_t *set)
{
	uint64_t mask = 0;
	for (int i = 1; i <= 64; i++)
		if (sigismember(set, i) == 1)
			mask |= 1UL << (i - 1);
	note(lines, "%s=%#lx\n", name, mask);
}

static void note_status(struct lines *lines, const char *path)
{
	static const char *const kept[] = { "Umask:",  "Uid:",    "Gid:",    "Groups:",     "CapInh:",      "CapPrm:",
					    "CapEff:", "CapBnd:", "CapAmb:", "NoNewPrivs:", "SigPnd:",      "ShdPnd:",
					    "SigBlk:", "SigIgn:", "SigCgt:", "Threads:",    "THP_enabled:", "Name:" };
	char line[4096];
	FILE *file = fopen(path, "r");
	NEED(file);
	while (fgets(line, sizeof(line), file))
		for (size_t i = 0; i < sizeof(kept) / sizeof(kept[0]); i++)
			if (!strncmp(line, kept[i], strlen(kept[i])))
				note(lines, "%s", line);
	fclose(file);
}

struct kernel_sigaction {
	uint64_t handler, flags, restorer, mask;
};

/* What a thread knows of itself alone. */
static void note_thread(struct lines *lines)
{
	char path[64], name[32] = "";
	stack_t stack;
	sigset_t mask;
	int number = 0;
	void *address = NULL;
	size_t length = 0;

	pid_t tid = (pid_t)syscall(SYS_gettid);
	note(lines, "tid=%d\n", tid);
	NEED(!sigaltstack(NULL, &stack));
	note(lines, "stack=%p %zu %d\n", stack.ss_sp, stack.ss_size, stack.ss_flags);
	NEED(!pthread_sigmask(SIG_SETMASK, NULL, &mask));
	note_mask(lines, "mask", &mask);
	NEED(!prctl(PR_GET_NAME, name));
	note(lines, "name=%s\n", name);
	NEED(!prctl(PR_GET_PDEATHSIG, &number));
	note(lines, "death=%d\n", number);
	NEED(!prctl(PR_GET_TID_ADDRESS, &address));
	note(lines, "tid address=%p\n", address);
	NEED(!syscall(SYS_get_robust_list, 0, &address, &length));
	note(lines, "robust list=%p %zu\n", address, length);
	note(lines, "policy=%d nice=%d\n", sched_getscheduler(0), getpriority(PRIO_PROCESS, (id_t)tid));
	note(lines, "secure bits=%d\n", prctl(PR_GET_SECUREBITS));
	snprintf(path, sizeof(path), "/proc/self/task/%d/status", tid);
	note_status(lines, path);
}

static timer_t timers[4];
static const int files[] = { 20, 21, 22, 23, 24, 25, 26, 27 };

static void note_task(struct lines *lines)
{
	char text[4200];

	for (int i = 1; i <= 64; i++) {
		struct kernel_sigaction action;
		if (i != SIGKILL && i != SIGSTOP) {
			NEED(!syscall(SYS_rt_sigaction, i, NULL, &action, 8));
			note(lines, "action %d=%#lx %#lx %#lx %#lx\n", i, action.handler, action.flags, action.restorer,
			     action.mask);
		}
	}
	for (int i = 0; i < 3; i++) {
		struct itimerval timer;
		NEED(!getitimer((enum __itimer_which)i, &timer));
		note(lines, "interval timer %d=%ld.%06ld rest %ld\n", i, timer.it_interval.tv_sec,
		     timer.it_interval.tv_usec, (timer.it_value.tv_sec + 5000) / 10000);
	}
	for (int i = 0; i < 4; i++) {
		struct itimerspec timer;
		NEED(!timer_gettime(timers[i], &timer));
		note(lines, "timer %d=%ld.%09ld rest %ld\n", i, timer.it_interval.tv_sec, timer.it_interval.tv_nsec,
		     (timer.it_value.tv_sec + 5000) / 10000);
	}
	for (int i = 0; i < 16; i++) {
		struct rlimit limit;
		NEED(!getrlimit((__rlimit_resource_t)i, &limit));
		note(lines, "limit %d=%lu %lu\n", i, limit.rlim_cur, limit.rlim_max);
	}
	for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++) {
		snprintf(text, 64, "/proc/self/fd/%d", files[i]);
		char name[1100];
		ssize_t length = readlink(text, name, sizeof(name) - 1);
		NEED(length > 0);
		name[length] = 0;
		note(lines, "file %d=%s at %ld, %#o, %d\n", files[i], name, lseek(files[i], 0, SEEK_CUR),
		     fcntl(files[i], F_GETFL) & ~O_DIRECTORY, /* CRIU opens directories without it */
		     fcntl(files[i], F_GETFD));
	}
	NEED(getcwd(text, sizeof(text)));
	note(lines, "cwd=%s\n", text);
	note(lines, "pid=%d pgid=%d sid=%d\n", getpid(), getpgid(0), getsid(0));
	note(lines, "dumpable=%d\n", prctl(PR_GET_DUMPABLE));
	int reaper = -1;
	NEED(!prctl(PR_GET_CHILD_SUBREAPER, &reaper));
	note(lines, "subreaper=%d\n", reaper);
	note(lines, "huge pages disabled=%d\n", prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0));
	int fd = open("/proc/self/oom_score_adj", O_RDONLY);
	ssize_t length = read(fd, text, 64);
	NEED(length > 0);
	close(fd);
	note(lines, "oom=%.*s", (int)length, text);
	fd = open("/proc/self/auxv", O_RDONLY);
	length = read(fd, text, sizeof(text));
	close(fd);
	for (ssize_t i = 0; i + 16 <= length; i += 16) {
		uint64_t pair[2];
		memcpy(pair, text + i, 16);
		note(lines, "auxv %lu=%#lx\n", pair[0], pair[1]);
	}
	/* The kernel reads the command line out of our memory, and takes what a userfaultfd has not served for empty.
	 */
	for (size_t i = 0; command_line[i]; i++)
		note(lines, "argument %zu=%s\n", i, command_line[i]);
	fd = open("/proc/self/cmdline", O_RDONLY);
	length = read(fd, text, sizeof(text));
	close(fd);
	for (ssize_t i = 0; i < length; i++)
		text[i] = text[i] ? text[i] : ' ';
	note(lines, "command line=%.*s\n", (int)length, text);
}

/* ---- setting up ---- */

static void handler(int number, siginfo_t *info, void *context)
{
	(void)number, (void)info, (void)context;
}

static void set_up_signals(void)
{
	struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK };
	sigaddset(&action.sa_mask, SIGUSR2);
	sigaddset(&action.sa_mask, SIGRTMAX);
	NEED(!sigaction(SIGUSR1, &action, NULL));
	action = (struct sigaction){ .sa_handler = SIG_IGN };
	NEED(!sigaction(SIGHUP, &action, NULL));
	action = (struct sigaction){ .sa_handler = SIG_DFL, .sa_flags = SA_NOCLDWAIT | SA_NOCLDSTOP };
	NEED(!sigaction(SIGCHLD, &action, NULL));
	action = (struct sigaction){ .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_NODEFER | (int)SA_RESETHAND };
	NEED(!sigaction(SIGRTMIN + 5, &action, NULL));

	/* Blocked in every thread, pending for the task and for this thread. */
	NEED(!kill(getpid(), SIGUSR2));
	for (int i = 0; i < 3; i++)
		NEED(!sigqueue(getpid(), SIGRTMIN + 2, (union sigval){ .sival_int = 70 + i }));
	for (int i = 0; i < 2; i++) {
		siginfo_t info = { .si_code = SI_QUEUE };
		info.si_value.sival_int = 90 + i;
		NEED(!syscall(SYS_rt_tgsigqueueinfo, getpid(), syscall(SYS_gettid), SIGRTMIN + 3, &info));
	}
}

static void check_signals(void)
{
	const struct {
		int number, value;
	} expected[] = { { SIGUSR2, 0 },       { SIGRTMIN + 2, 70 }, { SIGRTMIN + 2, 71 },
			 { SIGRTMIN + 2, 72 }, { SIGRTMIN + 3, 90 }, { SIGRTMIN + 3, 91 } };
	for (size_t i = 0; i < sizeof(expected) / sizeof(expected[0]); i++) {
		sigset_t set;
		siginfo_t info;
		struct timespec zero = { 0, 0 };
		sigemptyset(&set);
		sigaddset(&set, expected[i].number);
		NEED(sigtimedwait(&set, &info, &zero) == expected[i].number);
		if (info.si_value.sival_int != expected[i].value && expected[i].value)
			fail("signal %d with %d instead of %d", info.si_signo, info.si_value.sival_int,
			     expected[i].value);
		if (info.si_pid != getpid() && expected[i].value < 90)
			fail("signal %d from %d", info.si_signo, info.si_pid);
	}
}

static void set_up_timers(void)
{
	for (int i = 0; i < 3; i++) {
		struct itimerval timer = { { 100 + i, 5 }, { MANY, 7 } };
		NEED(!setitimer((enum __itimer_which)i, &timer, NULL));
	}
	const struct {
		clockid_t clock;
		int notify, number;
	} wanted[] = { { CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGUSR1 },
		       { CLOCK_REALTIME, SIGEV_NONE, 0 },
		       { CLOCK_BOOTTIME, SIGEV_THREAD_ID, SIGRTMIN + 6 },
		       { CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGALRM } };
	timer_t gone;
	for (int i = 0; i < 4; i++) {
		struct sigevent event = { .sigev_notify = wanted[i].notify, .sigev_signo = wanted[i].number };
		struct itimerspec times = { { 50 + i, 1 }, { MANY, 2 } };
		event.sigev_value.sival_int = 1000 + i;
		event._sigev_un._tid = getpid();
		if (i == 2) { /* so that numbers are not in a row */
			NEED(!timer_create(CLOCK_MONOTONIC, NULL, &gone));
			NEED(!timer_delete(gone));
		}
		NEED(!timer_create(wanted[i].clock, &event, &timers[i]));
		if (i < 3) /* the last stays disarmed */
			NEED(!timer_settime(timers[i], 0, &times, NULL));
	}
}

static void move(int fd, int to)
{
	NEED(fd >= 0);
	if (fd == to)
		return;
	NEED(dup2(fd, to) == to);
	close(fd);
}

static void set_up_files(void)
{
	int fd = open("data", O_RDWR | O_CREAT | O_TRUNC, 0640);
	for (uint64_t i = 0; i < 8 * PAGE / 8; i++)
		NEED(write(fd, &i, 8) == 8);
	NEED(lseek(fd, 1234, SEEK_SET) == 1234);
	move(fd, 20);
	NEED(dup2(20, 21) == 21);                     /* one open file */
	move(open("data", O_RDONLY | O_CLOEXEC), 22); /* another one of the same file, at its start */
	NEED(!fcntl(22, F_SETFD, FD_CLOEXEC));
	move(open("log", O_WRONLY | O_CREAT | O_APPEND, 0600), 23);
	NEED(write(23, "first\n", 6) == 6);
	move(open(".", O_RDONLY | O_DIRECTORY), 24);
	move(open("/dev/zero", O_RDONLY), 25);
	move(open("/dev/urandom", O_RDONLY | O_NONBLOCK), 26);
	move(open("/proc/self/status", O_RDONLY) >= 0 ? open("/dev/null", O_RDWR) : -1, 27);
	close(3);
}

static void check_files(void)
{
	uint64_t word;
	char byte;
	NEED(read(20, &byte, 1) == 1 && lseek(21, 0, SEEK_CUR) == 1235);
	NEED(pread(22, &word, 8, 800) == 8 && word == 100);
	NEED(lseek(22, 0, SEEK_CUR) == 0);
	NEED(lseek(23, 0, SEEK_SET) == 0 && write(23, "second\n", 7) == 7);
	struct stat status;
	NEED(!fstat(23, &status) && status.st_size == 13); /* appended all the same */
	NEED(read(25, &word, 8) == 8 && word == 0);
	NEED(read(26, &word, 8) == 8);
	NEED(fstatat(24, "data", &status, 0) == 0);
}

/* ---- memory ---- */

static uint64_t word_of(uint64_t address)
{
	uint64_t x = address + 0x9e3779b97f4a7c15UL;
	x ^= x >> 33;
	x *= 0xff51afd7ed558ccdUL;
	return (x ^ x >> 29) | 1;
}

static void fill(char *start, size_t length)
{
	for (size_t i = 0; i < length; i += 8)
		*(uint64_t *)(void *)(start + i) = word_of((uint64_t)(uintptr_t)(start + i));
}

static void check(const char *what, char *start, size_t length, bool filled)
{
	for (size_t i = 0; i < length; i += 8) {
		uint64_t expected = filled ? word_of((uint64_t)(uintptr_t)(start + i)) : 0;
		uint64_t found = *(volatile uint64_t *)(void *)(start + i);
		if (found != expected)
			fail("%s: at %p is %#lx instead of %#lx", what, (void *)(start + i), found, expected);
	}
}

static char *heap, *areas[12];
#define AREA (64 * PAGE)

static char *map(int prot, int flags, int fd)
{
	char *start = mmap(NULL, AREA + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	NEED(start != MAP_FAILED);
	NEED(mmap(start + PAGE, fd < 0 ? AREA : 8 * PAGE, prot, flags | MAP_FIXED, fd, 0) == start + PAGE);
	return start + PAGE;
}

static void set_up_memory(void)
{
	const int rw = PROT_READ | PROT_WRITE, anonymous = MAP_PRIVATE | MAP_ANONYMOUS;
	heap = sbrk((intptr_t)AREA);
	fill(heap, AREA);
	areas[0] = map(rw, anonymous, -1); /* filled */
	fill(areas[0], AREA);
	areas[1] = map(rw, anonymous, -1); /* every second page filled */
	for (size_t i = 0; i < AREA; i += 2 * PAGE)
		fill(areas[1] + i, PAGE);
	areas[2] = map(rw, anonymous, -1); /* only read: zero pages */
	check("zeros", areas[2], AREA, false);
	areas[3] = map(rw, anonymous, -1); /* filled, no longer readable */
	fill(areas[3], AREA);
	NEED(!mprotect(areas[3], AREA, PROT_NONE));
	areas[4] = map(rw, anonymous | MAP_NORESERVE, -1);
	fill(areas[4], AREA);
	NEED(!madvise(areas[4], AREA, MADV_DONTFORK));
	NEED(!madvise(areas[4], AREA, MADV_DONTDUMP));
	areas[5] = map(rw, MAP_SHARED | MAP_ANONYMOUS, -1);
	fill(areas[5], AREA / 2);
	areas[6] = map(rw, MAP_PRIVATE, 20); /* a file, two pages of it the task's own */
	fill(areas[6] + PAGE, 2 * PAGE);
	areas[7] = map(rw, MAP_SHARED, 20);
	areas[8] = map(PROT_READ, MAP_PRIVATE, 22);
	areas[9] = map(rw, anonymous, -1); /* dropped again in the middle */
	fill(areas[9], AREA);
	NEED(!madvise(areas[9] + AREA / 4, AREA / 2, MADV_DONTNEED));
	areas[10] = map(rw | PROT_EXEC, anonymous, -1);
	fill(areas[10], AREA);
	NEED(!mprotect(areas[10], AREA, PROT_READ | PROT_EXEC));
	areas[11] = map(rw, anonymous, -1);
	fill(areas[11], AREA);
	NEED(!mlock(areas[11], AREA));
}

static void check_file(const char *what, char *start, size_t length, uint64_t first)
{
	for (size_t i = 0; i < length; i += 8)
		if (*(uint64_t *)(void *)(start + i) != first + i / 8)
			fail("%s: at %p is not what is in the file", what, (void *)(start + i));
}

static void check_memory(void)
{
	check("heap", heap, AREA, true);
	check("filled", areas[0], AREA, true);
	for (size_t i = 0; i < AREA; i += PAGE)
		check("every second page", areas[1] + i, PAGE, i / PAGE % 2 == 0);
	check("zeros", areas[2], AREA, false);
	NEED(!mprotect(areas[3], AREA, PROT_READ));
	check("not readable", areas[3], AREA, true);
	check("kept from dumps", areas[4], AREA, true);
	check("shared", areas[5], AREA / 2, true);
	check("shared, not used", areas[5] + AREA / 2, AREA / 2, false);
	check_file("private file", areas[6], PAGE, 0);
	check("own pages of a file", areas[6] + PAGE, 2 * PAGE, true);
	check_file("private file", areas[6] + 3 * PAGE, 5 * PAGE, 3 * PAGE / 8);
	check_file("shared file", areas[7], 8 * PAGE, 0);
	check_file("read-only file", areas[8], 8 * PAGE, 0);
	check("dropped", areas[9], AREA / 4, true);
	check("dropped", areas[9] + AREA / 4, AREA / 2, false);
	check("dropped", areas[9] + 3 * AREA / 4, AREA / 4, true);
	check("code", areas[10], AREA, true);
	check("locked", areas[11], AREA, true);
	/* A shared mapping of a file is still one: what is written there the file has. */
	uint64_t word = 4711;
	*(uint64_t *)(void *)(areas[7] + 4096) = word;
	NEED(pread(22, &word, 8, 4096) == 8 && word == 4711);
}

/* ---- threads ---- */

static pthread_barrier_t set_up, checked;
static struct lines *thread_lines[600][2];

static void *run_thread(void *argument)
{
	size_t index = (size_t)(uintptr_t)argument;
	char name[16];
	sigset_t mask;

	snprintf(name, sizeof(name), "thread %zu", index);
	NEED(!prctl(PR_SET_NAME, name));
	sigfillset(&mask);
	if (index % 2)
		sigdelset(&mask, SIGRTMIN + 7);
	NEED(!pthread_sigmask(SIG_SETMASK, &mask, NULL));
	if (index % 3 == 1) {
		stack_t stack = { .ss_size = 65536 };
		NEED((stack.ss_sp = malloc(stack.ss_size)));
		NEED(!sigaltstack(&stack, NULL));
	}
	if (index % 4 == 1)
		NEED(!prctl(PR_SET_PDEATHSIG, SIGUSR2));
	if (index % 5 == 1)
		NEED(!setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), 5));
	if (index % 5 == 2) {
		struct sched_param parameter = { 0 };
		NEED(!sched_setscheduler(0, SCHED_BATCH, &parameter));
	}
	static __thread volatile uint64_t local;
	local = index * 31;
	NEED((thread_lines[index][0] = calloc(1, sizeof(struct lines))));
	NEED((thread_lines[index][1] = calloc(1, sizeof(struct lines))));
	pthread_barrier_wait(&set_up);
	note_thread(thread_lines[index][0]);
	pthread_barrier_wait(&set_up);
	uint64_t number = index % 3 ? 0 : registers_hold(registers_has_avx());
	if (number)
		fail("thread %zu: register %lu changed", index, number);
	while (!__atomic_load_n(&registers_stop, __ATOMIC_ACQUIRE)) {
		struct timespec second = { 1, 0 };
		nanosleep(&second, NULL);
	}
	note_thread(thread_lines[index][1]);
	compare(name, thread_lines[index][0], thread_lines[index][1]);
	if (local != index * 31)
		fail("thread %zu: what is its own is %lu", index, local);
	pthread_barrier_wait(&checked);
	return NULL;
}

static void give_up_root(void)
{
	gid_t groups[] = { 10, 20, 3000 };
	NEED(!setgroups(3, groups));
	NEED(!setresgid(4000, 4001, 4001));
	NEED(!setresuid(5000, 5001, 5001));
	NEED(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	NEED(!prctl(PR_SET_DUMPABLE, 1));
}

int main(int argc, char **argv)
{
	static struct lines before[2], after[2];
	char path[1200];
	sigset_t all;

	if (argc < 3)
		return 2;
	command_line = argv;
	size_t threads = (size_t)atoi(argv[2]);
	snprintf(dir, sizeof(dir), "%s", argv[1]);
	for (int fd = 3; fd < 256; fd++)
		close(fd);
	snprintf(path, sizeof(path), "%s/unfinished", dir);
	result_fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0666);
	move(result_fd, 30);
	result_fd = 30;
	NEED(!chdir(dir));
	umask(027);
	sigfillset(&all);
	sigdelset(&all, SIGTERM);
	NEED(!pthread_sigmask(SIG_SETMASK, &all, NULL));
	struct rlimit limit = { 200, 300 };
	NEED(!setrlimit(RLIMIT_NOFILE, &limit));
	NEED(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
	NEED(prctl(PR_CAPBSET_DROP, CAP_MKNOD) == 0);
	NEED(syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0) == 0);
	int fd = open("/proc/self/oom_score_adj", O_WRONLY);
	NEED(write(fd, "123", 3) == 3);
	close(fd);
	set_up_files();
	set_up_memory();
	if (argc > 3)
		give_up_root();
	set_up_signals();
	set_up_timers();
	NEED(!pthread_barrier_init(&set_up, NULL, (unsigned)threads + 1));
	NEED(!pthread_barrier_init(&checked, NULL, (unsigned)threads + 1));
	for (size_t i = 0; i < threads; i++) {
		pthread_t thread;
		NEED(!pthread_create(&thread, NULL, run_thread, (void *)(uintptr_t)i));
	}
	stack_t stack = { .ss_size = 65536 };
	NEED((stack.ss_sp = malloc(stack.ss_size)));
	NEED(!sigaltstack(&stack, NULL));
	pthread_barrier_wait(&set_up);

	note_thread(&before[0]);
	note_task(&before[1]);
	pthread_barrier_wait(&set_up);
	snprintf(path, sizeof(path), "%s/ready", dir);
	NEED(!mknod(path, S_IFREG | 0644, 0)); /* without a descriptor, that is */
	snprintf(path, sizeof(path), "%s/go", dir);
	void *end_of_heap = sbrk(0); /* nothing is allocated meanwhile */
	while (access(path, F_OK))
		usleep(2000);
	NEED(sbrk(0) == end_of_heap);

	note_thread(&after[0]);
	note_task(&after[1]);
	compare("main thread", &before[0], &after[0]);
	compare("task", &before[1], &after[1]);
	__atomic_store_n(&registers_stop, 1, __ATOMIC_RELEASE);
	pthread_barrier_wait(&checked);
	NEED(syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0) == 0);
	check_memory();
	check_files();
	check_signals();
	end("ok\n");
}
