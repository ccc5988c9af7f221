/* SPDX-License-Identifier: MIT */
/*
 * A task to rewind: rewound DIR MIB
 *
 * It sets itself up, creates DIR/ready, and waits for DIR/go. Then it checks that all is as it was set up, writes what
 * it found to DIR/result ("ok", or the first thing that is wrong), and changes all of it: memory, mappings, threads,
 * handlers, timers, positions. It creates DIR/changed, and goes on changing until it is rewound to its wait for DIR/go.
 * With DIR/late it does not compare its mappings: it was let go while old memory was still being freed.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#include <dirent.h>

#define PAGE 4096UL
#define WORKERS 4

static char dir[1024];

static void path_of(char *out, const char *name)
{
	snprintf(out, 1200, "%s/%s", dir, name);
}

static void say(const char *name, const char *line)
{
	char path[1200], to[1200];

	path_of(path, "unfinished");
	path_of(to, name);
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
	if (fd < 0 || write(fd, line, strlen(line)) < 0 || close(fd) || rename(path, to))
		_exit(4);
}

__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char *format, ...)
{
	char text[900];
	va_list args;
	va_start(args, format);
	vsnprintf(text, sizeof(text) - 1, format, args);
	va_end(args);
	strcat(text, "\n");
	say("result", text);
	_exit(1);
}

#define NEED(condition)                                                                                                \
	do {                                                                                                           \
		if (!(condition))                                                                                      \
			fail("line %d: %s: %s", __LINE__, #condition, strerror(errno));                                \
	} while (0)

static int is_there(const char *name)
{
	char path[1200];

	path_of(path, name);
	return !access(path, F_OK);
}

static uint64_t word_of(const void *address)
{
	uint64_t x = (uint64_t)(uintptr_t)address * 0x9e3779b97f4a7c15UL;
	return x ^ x >> 31;
}

static void fill(char *start, size_t length)
{
	for (size_t i = 0; i < length; i += 8)
		*(uint64_t *)(void *)(start + i) = word_of(start + i);
}

static void check(const char *what, char *start, size_t length, int filled)
{
	for (size_t i = 0; i < length; i += 8) {
		uint64_t found = *(volatile uint64_t *)(void *)(start + i);
		if (found != (filled ? word_of(start + i) : 0))
			fail("%s: %lx at %p", what, found, (void *)(start + i));
	}
}

/* ---- threads ---- */

static volatile uint64_t counts[WORKERS + 64];
static volatile int leave;
static pid_t tids[WORKERS];

static void *work(void *argument)
{
	size_t number = (size_t)(uintptr_t)argument;
	static __thread volatile uint64_t own;
	own = number * 77;
	if (number < WORKERS)
		tids[number] = (pid_t)syscall(SYS_gettid);
	while (leave != (int)number + 1) {
		counts[number]++;
		if (own != number * 77)
			fail("worker %zu: its own is %lu", number, own);
		if (number % 2 || counts[number] % 256 == 0)
			usleep(500);
	}
	return NULL;
}

static int count_threads(void)
{
	int count = 0;
	DIR *tasks = opendir("/proc/self/task");
	NEED(tasks);
	for (struct dirent *one; (one = readdir(tasks));)
		count += one->d_name[0] != '.';
	closedir(tasks);
	return count;
}

static void check_threads(void)
{
	char path[64];
	uint64_t then[WORKERS];

	if (count_threads() != WORKERS + 1)
		fail("%d threads", count_threads());
	for (int i = 0; i < WORKERS; i++) {
		snprintf(path, sizeof(path), "/proc/self/task/%d", tids[i]);
		NEED(!access(path, F_OK));
		then[i] = counts[i];
	}
	for (int i = 0; i < WORKERS; i++)
		for (int waits = 0; counts[i] == then[i]; waits++) {
			if (waits > 20000)
				fail("worker %d does not go on", i);
			usleep(500);
		}
}

/* ---- what it has ---- */

static char *large, *moved, *gone, *shut, *empty, *own_file, *shared, *twin, *heap;
static size_t large_bytes;
static int file;
static timer_t timer;
static char maps[65536];
static void *heap_end;
#define AREA (600 * PAGE)

static void handler(int number)
{
	(void)number;
}

static char *map(size_t length, int flags, int fd)
{
	char *start = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, fd, 0);
	NEED(start != MAP_FAILED);
	return start;
}

/*
 * Where each mapping is, and how. What an object of shared memory is called is not the task's business; nor whether the
 * kernel has made one of two mappings of private memory that lie side by side, which depends on what was touched first.
 */
static void read_maps(char *out, size_t size)
{
	char line[1024], how[8], how_before[8] = "";
	unsigned long start, end, end_before = 0, inode;
	size_t length = 0, at_end = 0; /* of the line before: where its end stands */
	FILE *text = fopen("/proc/self/maps", "r");
	NEED(text);
	while (fgets(line, sizeof(line), text)) {
		NEED(sscanf(line, "%lx-%lx %7s %*x %*s %lu", &start, &end, how, &inode) == 4);
		bool is_private = !inode && !strchr(line, '[');
		if (is_private && start == end_before && !strcmp(how, how_before)) {
			length = at_end;
		} else {
			length += (size_t)snprintf(out + length, size - length, "%lx-", start);
			at_end = length;
		}
		length += (size_t)snprintf(out + length, size - length, "%lx %s\n", end, how);
		NEED(length < size);
		end_before = end;
		strcpy(how_before, is_private ? how : "");
	}
	fclose(text);
}

static void set_up(size_t mib)
{
	char path[1200];
	const int anonymous = MAP_PRIVATE | MAP_ANONYMOUS;

	path_of(path, "data");
	file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	NEED(file >= 0);
	for (uint64_t i = 0; i < AREA / 8; i++)
		NEED(write(file, &i, 8) == 8);
	NEED(lseek(file, 4321, SEEK_SET) == 4321);
	large_bytes = mib << 20;
	fill(large = map(large_bytes, anonymous, -1), large_bytes);
	fill(moved = map(AREA, anonymous, -1), AREA);
	fill(gone = map(AREA, anonymous, -1), AREA);
	fill(shut = map(AREA, anonymous, -1), AREA);
	empty = map(AREA, anonymous, -1);
	own_file = map(AREA, MAP_PRIVATE, file);
	fill(own_file + PAGE, 3 * PAGE);
	fill(shared = map(AREA, MAP_SHARED | MAP_ANONYMOUS, -1), AREA / 2);
	fill(twin = map(AREA, MAP_SHARED | MAP_ANONYMOUS, -1), AREA);
	fill(heap = sbrk((intptr_t)AREA), AREA);
	NEED(signal(SIGUSR1, handler) != SIG_ERR && signal(SIGUSR2, SIG_IGN) != SIG_ERR);
	sigset_t mask;
	sigemptyset(&mask);
	sigaddset(&mask, SIGRTMIN + 1);
	NEED(!sigprocmask(SIG_BLOCK, &mask, NULL));
	NEED(!sigqueue(getpid(), SIGRTMIN + 1, (union sigval){ .sival_int = 55 }));
	struct itimerspec times = { { 0, 0 }, { 90000, 0 } };
	NEED(!timer_create(CLOCK_MONOTONIC, &(struct sigevent){ .sigev_notify = SIGEV_NONE }, &timer));
	NEED(!timer_settime(timer, 0, &times, NULL));
	stack_t stack = { .ss_size = 65536, .ss_sp = map(65536, anonymous, -1) };
	NEED(!sigaltstack(&stack, NULL));
	NEED(!chdir(dir));
	umask(027);
	for (size_t i = 0; i < WORKERS; i++) {
		pthread_t thread;
		NEED(!pthread_create(&thread, NULL, work, (void *)(uintptr_t)i));
	}
	while (!tids[0] || !tids[1] || !tids[2] || !tids[3])
		usleep(100);
	free(malloc(1 << 16));
}

/* What was asked of madvise and mlock since is forgotten. */
static void check_flags(const char *at)
{
	char line[4096];
	unsigned long start, end;
	int is_here = 0;
	FILE *file_of_maps = fopen("/proc/self/smaps", "r");
	NEED(file_of_maps);
	while (fgets(line, sizeof(line), file_of_maps)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			is_here = start <= (uintptr_t)at && (uintptr_t)at < end;
		else if (is_here && !strncmp(line, "VmFlags:", 8) &&
			 (strstr(line, " dc") || strstr(line, " dd") || strstr(line, " lo") || strstr(line, " rr")))
			fail("the mapping at %p: %s", (const void *)at, line);
	}
	fclose(file_of_maps);
}

static void check_all(void)
{
	static char now[sizeof(maps)];
	struct sigaction action;
	struct itimerspec times;
	struct itimerval interval;
	stack_t stack;
	sigset_t pending, mask;
	char cwd[1100], name[32];

	if (!is_there("late")) {
		read_maps(now, sizeof(now));
		if (strcmp(maps, now)) {
			size_t at = 0;
			while (now[at] == maps[at])
				at++;
			while (at && now[at - 1] != '\n')
				at--;
			fail("mappings: was %.60s, is %.60s", maps + at, now + at);
		}
	}
	check("large", large, large_bytes, 1);
	check("moved", moved, AREA, 1);
	check("gone", gone, AREA, 1);
	check("shut", shut, AREA, 1);
	check("empty", empty, AREA, 0);
	check("own pages of a file", own_file + PAGE, 3 * PAGE, 1);
	for (size_t i = 4 * PAGE; i < AREA; i += 8)
		if (*(uint64_t *)(void *)(own_file + i) != i / 8)
			fail("file: at %zu", i);
	check("shared", shared, AREA / 2, 1);
	check("shared", shared + AREA / 2, AREA / 2, 0);
	check("twin", twin, AREA, 1);
	check_flags(own_file);
	check_flags(twin);
	check("heap", heap, AREA, 1);
	NEED(sbrk(0) == heap_end);
	check_threads();
	NEED(!sigaction(SIGUSR1, NULL, &action) && action.sa_handler == handler);
	NEED(!sigaction(SIGUSR2, NULL, &action) && action.sa_handler == SIG_IGN);
	NEED(!sigaction(SIGURG, NULL, &action) && action.sa_handler == SIG_DFL);
	NEED(!sigprocmask(SIG_BLOCK, NULL, &mask) && sigismember(&mask, SIGRTMIN + 1) && !sigismember(&mask, SIGHUP));
	NEED(!sigpending(&pending) && sigismember(&pending, SIGRTMIN + 1) && !sigismember(&pending, SIGRTMIN + 2));
	NEED(!timer_gettime(timer, &times) && times.it_value.tv_sec > 80000);
	NEED(timer_gettime((timer_t)((uintptr_t)timer + 1), &times) && errno == EINVAL);
	NEED(!getitimer(ITIMER_REAL, &interval) && !interval.it_value.tv_sec && !interval.it_value.tv_usec);
	NEED(!sigaltstack(NULL, &stack) && stack.ss_size == 65536 && !stack.ss_flags);
	NEED(lseek(file, 0, SEEK_CUR) == 4321);
	NEED(getcwd(cwd, sizeof(cwd)) && !strcmp(cwd, dir));
	NEED(umask(027) == 027);
	NEED(!prctl(PR_GET_NAME, name) && !strcmp(name, "rewound"));
}

static void change_all(void)
{
	char *to;
	uint64_t x = (uint64_t)time(NULL) | 1;
	sigset_t mask;
	timer_t other;
	pthread_t thread;
	const int anonymous = MAP_PRIVATE | MAP_ANONYMOUS;

	for (size_t i = 0; i < large_bytes / PAGE / 100 + 1; i++) {
		x = x * 6364136223846793005UL + 1442695040888963407UL;
		memset(large + (x >> 20) % (large_bytes / PAGE) * PAGE, 0xA5, PAGE);
	}
	NEED((to = mremap(moved, AREA, 2 * AREA, MREMAP_MAYMOVE)) != MAP_FAILED);
	memset(to, 0x33, 2 * AREA);
	NEED(!munmap(gone, AREA));
	NEED(mmap(gone + 5 * PAGE, PAGE, PROT_READ, anonymous | MAP_FIXED, -1, 0) != MAP_FAILED);
	memset(shut, 0x44, AREA);
	NEED(!mprotect(shut, AREA / 2, PROT_NONE));
	memset(empty, 0x55, AREA);
	memset(own_file, 0x66, AREA);
	if (x >> 40 & 1)
		NEED(!munmap(own_file, AREA));
	else
		NEED(!mprotect(own_file, 2 * PAGE, PROT_READ));
	for (int i = 0; i < 3; i++) {
		NEED(!madvise(own_file, AREA, (int[]){ MADV_DONTFORK, MADV_DONTDUMP, MADV_RANDOM }[i]) || x >> 40 & 1);
		NEED(!madvise(twin, AREA, (int[]){ MADV_DONTFORK, MADV_DONTDUMP, MADV_RANDOM }[i]));
	}
	NEED(!mlock(twin, AREA));
	memset(shared, 0x77, AREA);
	memset(twin, 0x78, AREA);
	if (x >> 42 & 1) /* now both are one object */
		NEED(mremap(shared, 0, AREA, MREMAP_MAYMOVE | MREMAP_FIXED, twin) == twin);
	if (x >> 41 & 1)
		NEED(mmap(shared, AREA, PROT_READ, anonymous | MAP_FIXED, -1, 0) != MAP_FAILED);
	memset(heap, 0x11, AREA);
	NEED(sbrk(1 << 20) != (void *)-1);
	memset(map(8 << 20, anonymous, -1), 0x22, 8 << 20);
	for (size_t i = 0; i < 3; i++)
		NEED(!pthread_create(&thread, NULL, work, (void *)(uintptr_t)(WORKERS + i)));
	leave = 2; /* worker 1 ends */
	while (count_threads() != WORKERS + 3)
		usleep(100);
	NEED(signal(SIGUSR1, SIG_IGN) != SIG_ERR && signal(SIGURG, handler) != SIG_ERR);
	sigfillset(&mask);
	NEED(!sigprocmask(SIG_SETMASK, &mask, NULL));
	NEED(!raise(SIGHUP));
	NEED(!pthread_sigqueue(pthread_self(), SIGRTMIN + 2, (union sigval){ .sival_int = 56 }));
	NEED(!timer_delete(timer));
	for (int i = 0; i < 2; i++)
		NEED(!timer_create(CLOCK_MONOTONIC, NULL, &other));
	NEED(!setitimer(ITIMER_REAL, &(struct itimerval){ { 500, 0 }, { 500, 0 } }, NULL));
	NEED(!sigaltstack(&(stack_t){ .ss_flags = SS_DISABLE }, NULL));
	NEED(!mlockall(MCL_FUTURE)); /* what is mapped from here on has its pages at once */
	memset(map(AREA, anonymous, -1), 0x12, AREA);
	NEED(lseek(file, 7, SEEK_SET) == 7);
	NEED(!chdir("/"));
	umask(0);
	NEED(!prctl(PR_SET_NAME, "changed"));
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	snprintf(dir, sizeof(dir), "%s", argv[1]);
	for (int fd = 3; fd < 256; fd++)
		close(fd);
	set_up((size_t)atol(argv[2]));
	heap_end = sbrk(0);
	read_maps(maps, sizeof(maps));
	read_maps(maps, sizeof(maps)); /* now that stdio has its buffers */
	say("ready", "");
	while (!is_there("go"))
		usleep(500);
	check_all();
	say("result", "ok\n");
	change_all();
	say("changed", "");
	for (volatile uint64_t i = 0;; i++) {
		memset(large + i % (large_bytes / PAGE) * PAGE, (int)i, 8);
		if (i % 256 == 0)
			usleep(500);
	}
}
