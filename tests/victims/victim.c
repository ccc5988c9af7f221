/* SPDX-License-Identifier: MIT */
/*
 * A program to checkpoint and restore: victim SCENARIO DIR
 *
 * It fills memory with words that are a function of their own address, creates DIR/ready and polls for DIR/go. The
 * harness dumps it while it polls and creates DIR/go before it restores, so that the scenario starts the moment the
 * restored task runs and every access races with the fill. Each scenario checks every byte of its memory at the end
 * and appends one line to DIR/result: "ok", or the first bad address with what was expected and what was read.
 *
 * Nothing but regular files by path is used before the dump, so that any CRIU can dump it.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

#define PAGE ((size_t)4096)
#define KIB(n) ((size_t)(n) << 10)
#define MIB(n) ((size_t)(n) << 20)
#define GIB(n) ((size_t)(n) << 30)

static const char *scenario;
static const char *self;
static char dir[1024];

/* Generations of content. Any other number is a later write of the scenario's own. */
enum { ZERO = 0, DUMPED = 1 };

/* ---- reporting ---- */

static void path_of(char *out, size_t size, const char *name)
{
	snprintf(out, size, "%s/%s", dir, name);
}

static void append_result(const char *line)
{
	char path[1200];
	path_of(path, sizeof(path), "result");
	int fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
	if (fd < 0 || write(fd, line, strlen(line)) < 0)
		_exit(4);
	close(fd);
}

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
{
	char text[512], line[700];
	va_list args;
	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	snprintf(line, sizeof(line), "%s (pid %d): %s\n", scenario, getpid(), text);
	append_result(line);
	kill(0, SIGKILL); /* the whole group: no half of a tree stays behind */
	_exit(3);
}

#define NEED(condition)                                                                                                \
	do {                                                                                                           \
		if (!(condition))                                                                                      \
			fail("line %d: %s: %s", __LINE__, #condition, strerror(errno));                                \
	} while (0)

static void done(void)
{
	append_result("ok\n");
	_exit(0);
}

/* ---- content ---- */

static inline uint64_t word_of(uint64_t address, uint64_t generation)
{
	uint64_t x = address + generation * 0x9e3779b97f4a7c15ULL;
	x ^= x >> 33;
	x *= 0xff51afd7ed558ccdULL;
	x ^= x >> 33;
	x *= 0xc4ceb9fe1a85ec53ULL;
	x ^= x >> 33;
	return generation ? x | 1 : 0; /* never zero, so that a lost word always shows */
}

static void fill(void *memory, uint64_t base, size_t length, uint64_t generation)
{
	uint64_t *words = memory;
	for (size_t i = 0; i < length / 8; i++)
		words[i] = word_of(base + i * 8, generation);
}

static void check(const void *memory, uint64_t base, size_t length, uint64_t generation)
{
	const volatile uint64_t *words = memory;
	for (size_t i = 0; i < length / 8; i++) {
		uint64_t got = words[i], expected = word_of(base + i * 8, generation);
		if (got != expected)
			fail("bad word at %p (was at %#lx, generation %lu): expected %#lx, got %#lx, again %#lx",
			     (const void *)(words + i), base + i * 8, generation, expected, got, words[i]);
	}
}

#define AT(pointer) ((uint64_t)(uintptr_t)(pointer))

static void fill_own(char *pointer, size_t length)
{
	fill(pointer, AT(pointer), length, DUMPED);
}

static void check_own(const char *pointer, size_t length)
{
	check(pointer, AT(pointer), length, DUMPED);
}

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state * 0x2545f4914f6cdd1dULL;
}

static uint64_t fresh_seed(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return ((uint64_t)now.tv_nsec << 20 ^ (uint64_t)now.tv_sec ^ (uint64_t)getpid() << 48) | 1;
}

/* Check every page once, in an order that is a full cycle of a linear congruential step. */
static void check_shuffled(const char *memory, uint64_t base, size_t length, uint64_t generation, uint64_t seed)
{
	size_t pages = length / PAGE, power = 1;
	while (power < pages)
		power *= 2;
	size_t at = seed % power, step = (seed >> 20 | 1) % power | 1;
	for (size_t i = 0; i < power; i++) {
		if (at < pages)
			check(memory + at * PAGE, base + at * PAGE, PAGE, generation);
		at = (at * 5 + step) & (power - 1);
	}
}

static char *map_at(void *address, size_t length, int extra)
{
	char *p = mmap(address, length, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (address ? MAP_FIXED : 0) | extra, -1, 0);
	NEED(p != MAP_FAILED);
	return p;
}

/* Map with a gap of address space on both sides, so that no two mappings become one VMA. */
static char *map_apart(size_t length)
{
	char *p = mmap(NULL, length + 2 * MIB(2), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	NEED(p != MAP_FAILED);
	char *start = (char *)((AT(p) + MIB(4) - 1) & ~(MIB(2) - 1));
	NEED(munmap(p, length + 2 * MIB(2)) == 0);
	start = map_at(start, length, 0);
	return start;
}

static char *map_filled(size_t length)
{
	char *p = map_apart(length);
	fill_own(p, length);
	return p;
}

/* ---- the dump happens inside here ---- */

static void nap(long microseconds)
{
	struct timespec t = { microseconds / 1000000, microseconds % 1000000 * 1000 };
	nanosleep(&t, NULL);
}

static bool go_given(void)
{
	char path[1200];
	path_of(path, sizeof(path), "go");
	return access(path, F_OK) == 0;
}

static void wait_for_dump(void)
{
	char path[1200];
	path_of(path, sizeof(path), "ready");
	int fd = open(path, O_WRONLY | O_CREAT, 0644);
	NEED(fd >= 0);
	close(fd);
	while (!go_given())
		nap(500);
}

static void reap(pid_t pid, int expected)
{
	int status;
	pid_t got;
	do
		got = waitpid(pid, &status, 0);
	while (got < 0 && errno == EINTR);
	NEED(got == pid);
	if (status != expected)
		fail("child %d ended with status %#x, expected %#x", pid, status, expected);
}

/* ---- scenarios ---- */

struct reader {
	pthread_t thread;
	char *memory;
	size_t length;
	uint64_t seed;
	atomic_int *start;
	atomic_int *stop; /* NULL: once */
};

static void *reader_main(void *argument)
{
	struct reader *r = argument;
	while (r->start && !atomic_load(r->start))
		nap(500);
	do
		check_shuffled(r->memory, AT(r->memory), r->length, DUMPED, r->seed++);
	while (r->stop && !atomic_load(r->stop));
	return NULL;
}

static void start_readers(struct reader *readers, int count, char *memory, size_t length, atomic_int *start,
			  atomic_int *stop)
{
	for (int i = 0; i < count; i++) {
		readers[i] = (struct reader){ .memory = memory,
					      .length = length,
					      .seed = fresh_seed() + (uint64_t)i * 77777 };
		readers[i].start = start;
		readers[i].stop = stop;
		NEED(pthread_create(&readers[i].thread, NULL, reader_main, &readers[i]) == 0);
	}
}

static void join_readers(struct reader *readers, int count)
{
	for (int i = 0; i < count; i++)
		NEED(pthread_join(readers[i].thread, NULL) == 0);
}

/* One thread, in address order and then at random: the plain case. */
static void plain(void)
{
	size_t length = MIB(64);
	char *ordered = map_filled(length), *random = map_filled(length);
	wait_for_dump();
	check_own(ordered, length);
	check_shuffled(random, AT(random), length, DUMPED, fresh_seed());
	check_own(random, length);
}

/* Many threads, some older than the dump and some younger, over the same pages. */
static void threads(void)
{
	static struct reader old[8], young[8];
	static atomic_int start;
	size_t length = MIB(96);
	char *p = map_filled(length);
	start_readers(old, 8, p, length, &start, NULL);
	wait_for_dump();
	atomic_store(&start, 1);
	start_readers(young, 8, p, length, NULL, NULL);
	check_own(p, length);
	join_readers(old, 8);
	join_readers(young, 8);
}

/* Fork while pages are missing; parent and child check, each writes what the other must not see, the child forks. */
static void forks(void)
{
	size_t length = MIB(48);
	char *p = map_filled(length);
	wait_for_dump();
	pid_t children[6];
	for (int i = 0; i < 6; i++) {
		uint64_t seed = fresh_seed();
		for (int j = 0; j < 50; j++) {
			char *page = p + next_random(&seed) % (length / PAGE) * PAGE;
			if ((AT(page) / PAGE) % 16 != 5)
				check_own(page, PAGE);
		}
		children[i] = fork();
		NEED(children[i] >= 0);
		if (children[i] == 0) {
			pid_t grandchild = 0;
			if (i % 2 == 0) {
				grandchild = fork();
				NEED(grandchild >= 0);
			}
			seed = fresh_seed();
			uint64_t mine = 1000 + (uint64_t)i * 2 + (grandchild == 0);
			for (size_t at = 0; at < length; at += 64 * PAGE)
				fill(p + at, AT(p + at), PAGE, mine);
			for (size_t at = 0; at < length; at += PAGE) {
				size_t number = AT(p + at) / PAGE % 16;
				if (at % (64 * PAGE) == 0)
					check(p + at, AT(p + at), PAGE, mine);
				else if (number == 5) /* written by the parent before or after this fork */
					check(p + at, AT(p + at), PAGE, i ? 10 + (uint64_t)i - 1 : DUMPED);
				else
					check_own(p + at, PAGE);
			}
			if (grandchild > 0)
				reap(grandchild, 0);
			_exit(0);
		}
		for (size_t at = 0; at < length; at += PAGE)
			if (AT(p + at) / PAGE % 16 == 5)
				fill(p + at, AT(p + at), PAGE, 10 + (uint64_t)i);
	}
	for (size_t at = 0; at < length; at += PAGE)
		check(p + at, AT(p + at), PAGE, AT(p + at) / PAGE % 16 == 5 ? 15 : DUMPED);
	for (int i = 0; i < 6; i++)
		reap(children[i], 0);
}

/* Quick forks, children that end at once or become another program, while threads fault. */
static void forkstorm(void)
{
	static struct reader readers[4];
	static atomic_int start, stop;
	size_t length = MIB(64);
	char *p = map_filled(length);
	start_readers(readers, 4, p, length, &start, &stop);
	wait_for_dump();
	atomic_store(&start, 1);
	uint64_t seed = fresh_seed();
	for (int i = 0; i < 40; i++) {
		char *page = p + next_random(&seed) % (length / PAGE) * PAGE;
		pid_t pid = fork();
		NEED(pid >= 0);
		if (pid == 0) {
			if (i % 4 == 1) {
				check_own(page, PAGE);
				check_own(p, length / 16);
			}
			if (i % 4 == 2) {
				execl("/bin/true", "true", (char *)NULL);
				_exit(9);
			}
			if (i % 4 == 3)
				raise(SIGKILL);
			_exit(0);
		}
		if (i % 5 == 0) {
			char *const arguments[] = { "true", NULL };
			char *const environment[] = { NULL };
			pid_t spawned;
			NEED(posix_spawn(&spawned, "/bin/true", NULL, NULL, arguments, environment) == 0);
			reap(spawned, 0);
		}
		reap(pid, i % 4 == 3 ? SIGKILL : 0);
	}
	atomic_store(&stop, 1);
	join_readers(readers, 4);
	check_own(p, length);
}

/* A mapping that a child does not get: no event says so. */
static void dontfork(void)
{
	size_t length = MIB(32);
	char *plain_area = map_filled(length), *absent = map_filled(length);
	NEED(madvise(absent, length, MADV_DONTFORK) == 0);
	wait_for_dump();
	pid_t pid = fork();
	NEED(pid >= 0);
	if (pid == 0) {
		check_shuffled(plain_area, AT(plain_area), length, DUMPED, fresh_seed());
		NEED(madvise(absent, length, MADV_NORMAL) < 0 && errno == ENOMEM);
		/* something else where the parent still has it */
		map_at(absent, length, 0);
		check(absent, AT(absent), length, ZERO);
		_exit(0);
	}
	check_own(absent, length);
	check_own(plain_area, length);
	reap(pid, 0);
}

/* A mapping that a child gets empty: no event says so, its VMA does. */
static void wipeonfork(void)
{
	size_t length = MIB(32);
	char *wiped = map_filled(length);
	NEED(madvise(wiped, length, MADV_WIPEONFORK) == 0);
	wait_for_dump();
	check_own(wiped, PAGE);
	pid_t pid = fork();
	NEED(pid >= 0);
	if (pid == 0) {
		check(wiped, AT(wiped), MIB(1), ZERO);
		nap(20000);
		check(wiped, AT(wiped), length, ZERO);
		_exit(0);
	}
	check_own(wiped, length);
	reap(pid, 0);
}

static char *reserve(size_t length)
{
	char *p = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	NEED(p != MAP_FAILED);
	NEED(munmap(p, length) == 0);
	return p;
}

/* Move, grow, shrink and split with mremap. */
static void remap(void)
{
	size_t length = MIB(32);
	char *moved = map_filled(length), *grown = map_filled(length), *split = map_filled(length);
	char *shrunk = map_filled(length), *inplace = map_filled(length), *twice = map_filled(length);
	wait_for_dump();
	char *to = reserve(GIB(1));

	check_own(moved + MIB(1), MIB(1));
	NEED(mremap(moved, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
	check(to + MIB(8), AT(moved + MIB(8)), MIB(2), DUMPED);
	/* something new where it was: the kernel's zeros, not the image's bytes */
	map_at(moved, length, 0);
	check(moved + MIB(8), 0, MIB(4), ZERO);
	fill(moved, AT(moved), MIB(1), 7);
	check_shuffled(to, AT(moved), length, DUMPED, fresh_seed());

	char *to2 = to + MIB(128);
	check_own(grown + MIB(3), PAGE);
	NEED(mremap(grown, length, 2 * length, MREMAP_MAYMOVE | MREMAP_FIXED, to2) == to2);
	check(to2 + length + MIB(5), 0, MIB(1), ZERO);
	fill(to2 + 2 * length - MIB(1), AT(grown), MIB(1), 8);
	check(to2, AT(grown), length, DUMPED);
	check(to2 + length, 0, length - MIB(1), ZERO);
	check(to2 + 2 * length - MIB(1), AT(grown), MIB(1), 8);

	char *to3 = to + MIB(256);
	size_t third = MIB(10);
	NEED(mremap(split + third, third, third, MREMAP_MAYMOVE | MREMAP_FIXED, to3) == to3);
	check(split + third - PAGE, AT(split + third - PAGE), PAGE, DUMPED);
	check(to3, AT(split + third), third, DUMPED);
	check_own(split, third);
	check_own(split + 2 * third, length - 2 * third);

	NEED(mremap(shrunk, length, MIB(12), 0) == shrunk);
	check_own(shrunk + MIB(11), MIB(1));
	check_own(shrunk, MIB(12));

	char *longer = mremap(inplace, length, length + MIB(1), 0); /* map_apart leaves room behind */
	if (longer != MAP_FAILED) {
		check(inplace + length, 0, MIB(1), ZERO);
		fill(inplace + length, AT(inplace + length), MIB(1), 9);
		check(inplace + length, AT(inplace + length), MIB(1), 9);
	}
	check_own(inplace, length);

	/* there and back, in pieces, twice */
	for (int round = 0; round < 2; round++) {
		char *there = to + MIB(384);
		for (size_t at = 0; at < length; at += MIB(1))
			NEED(mremap(twice + at, MIB(1), MIB(1), MREMAP_MAYMOVE | MREMAP_FIXED,
				    there + length - MIB(1) - at) != MAP_FAILED);
		for (size_t at = 0; at < length; at += MIB(2))
			check(there + length - MIB(1) - at, AT(twice + at), MIB(1), DUMPED);
		for (size_t at = 0; at < length; at += MIB(1))
			NEED(mremap(there + length - MIB(1) - at, MIB(1), MIB(1), MREMAP_MAYMOVE | MREMAP_FIXED,
				    twice + at) != MAP_FAILED);
	}
	check_own(twice, length);
	check(moved, AT(moved), MIB(1), 7);
	check(moved + MIB(1), 0, length - MIB(1), ZERO);
	check(to, AT(moved), length, DUMPED);
}

/* What realloc() does: a block with long untouched runs grows as one piece; it must still be one mapping. */
static void regrow(void)
{
	enum { BLOCKS = 8 };
	size_t length = MIB(64);
	char *blocks[BLOCKS];
	for (int i = 0; i < BLOCKS; i++) {
		blocks[i] = map_apart(length);
		for (int piece = 0; piece < 8; piece++) /* 1 MiB used, 7 MiB not */
			fill_own(blocks[i] + MIB(8) * (size_t)piece + MIB(i % 7), MIB(1));
	}
	wait_for_dump();
	for (int i = 0; i < BLOCKS; i++) {
		nap(i * 3000); /* at different moments of the fill */
		size_t bigger = length + MIB(16) + MIB(i);
		char *now = mremap(blocks[i], length, bigger, MREMAP_MAYMOVE);
		NEED(now != MAP_FAILED);
		for (size_t at = 0; at < bigger; at += MIB(1)) {
			bool used = at < length && at / MIB(1) % 8 == (size_t)(i % 7);
			check(now + at, AT(blocks[i] + at), MIB(1), used ? DUMPED : ZERO);
		}
	}
}

/* MREMAP_DONTUNMAP leaves an empty, still registered mapping behind. */
static void dontunmap(void)
{
	size_t length = MIB(32);
	char *p = map_filled(length);
	wait_for_dump();
	check_own(p + MIB(2), PAGE);
	char *to = mremap(p, length, length, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
	NEED(to != MAP_FAILED);
	check(p + MIB(4), 0, MIB(1), ZERO);
	check(to + MIB(4), AT(p + MIB(4)), MIB(1), DUMPED);
	nap(20000);
	check(p, 0, length, ZERO);
	fill(p, AT(p), length, 5);
	check(to, AT(p), length, DUMPED);
	check(p, AT(p), length, 5);
}

/* Unmap parts and wholes, also more than 2 GiB at once, and map again at the same place. */
static void unmap(void)
{
	size_t length = MIB(64), big = GIB(3);
	char *p = map_filled(length), *whole = map_filled(MIB(16)), *huge = map_apart(big);
	for (size_t at = 0; at < big; at += MIB(4))
		fill_own(huge + at, 2 * PAGE);
	wait_for_dump();
	check_own(huge + big / 2, PAGE);
	NEED(munmap(huge, big) == 0);
	map_at(huge, big, 0);
	for (size_t at = 0; at < big; at += MIB(4))
		check(huge + at, 0, 3 * PAGE, ZERO);

	for (size_t at = 0; at < length; at += MIB(4)) {
		check_own(p + at + MIB(3), PAGE);
		NEED(munmap(p + at, MIB(1)) == 0);
		if (at % MIB(8) == 0) {
			map_at(p + at, MIB(1), 0);
			check(p + at + KIB(256), 0, KIB(64), ZERO);
			fill(p + at, AT(p + at), KIB(512), 4);
		}
	}
	for (size_t at = 0; at < length; at += MIB(4)) {
		check_own(p + at + MIB(1), MIB(3));
		if (at % MIB(8) == 0) {
			check(p + at, AT(p + at), KIB(512), 4);
			check(p + at + KIB(512), 0, KIB(512), ZERO);
		}
	}
	NEED(munmap(whole, MIB(16)) == 0);
	map_at(whole, MIB(16), 0);
	check(whole, 0, MIB(16), ZERO);
	/* mapping over, with no munmap before */
	map_at(p + MIB(2), MIB(1), 0);
	check(p + MIB(2), 0, MIB(1), ZERO);
	check_own(p + MIB(1), MIB(1));
	check_own(p + MIB(3), MIB(1));
}

/* DONTNEED and FREE, then read and write. */
static void advise(void)
{
	size_t length = MIB(64), big = GIB(3);
	char *p = map_filled(length), *freed = map_filled(MIB(32)), *huge = map_apart(big), *again = map_filled(MIB(8));
	for (size_t at = 0; at < big; at += MIB(4))
		fill_own(huge + at, 2 * PAGE);
	wait_for_dump();
	NEED(madvise(huge, big, MADV_DONTNEED) == 0);
	for (size_t at = 0; at < big; at += MIB(4))
		check(huge + at, 0, 3 * PAGE, ZERO);

	for (size_t at = 0; at < length; at += MIB(1)) {
		check_own(p + at + KIB(512) - PAGE, PAGE);
		NEED(madvise(p + at + KIB(512), KIB(256), MADV_DONTNEED) == 0);
		if (at % MIB(2) == 0)
			check(p + at + KIB(512), 0, PAGE, ZERO); /* read first */
		fill(p + at + KIB(640), AT(p + at), PAGE, 6);    /* write first */
	}
	for (size_t at = 0; at < length; at += MIB(1)) {
		check_own(p + at, KIB(512));
		check(p + at + KIB(512), 0, KIB(128), ZERO);
		check(p + at + KIB(640), AT(p + at), PAGE, 6);
		check(p + at + KIB(640) + PAGE, 0, KIB(128) - PAGE, ZERO);
		check_own(p + at + KIB(768), KIB(256));
	}

	/* a freed page is whole or zero until it is written, then it is what was written */
	for (size_t at = 0; at < MIB(32); at += MIB(1)) {
		NEED(madvise(freed + at, KIB(512), MADV_FREE) == 0);
		for (size_t page = at; page < at + KIB(256); page += PAGE) {
			uint64_t first = *(volatile uint64_t *)(freed + page);
			if (first)
				NEED(first == word_of(AT(freed + page), DUMPED));
		}
		fill(freed + at, AT(freed + at), KIB(512), 8);
	}
	for (size_t at = 0; at < MIB(32); at += MIB(1)) {
		check(freed + at, AT(freed + at), KIB(512), 8);
		check_own(freed + at + KIB(512), KIB(512));
	}

	/* over and over on the same pages */
	for (uint64_t round = 1; round < 200; round++) {
		size_t at = round * 37 % 1024 * 2 * PAGE;
		NEED(madvise(again + at, 2 * PAGE, MADV_DONTNEED) == 0);
		check(again + at, 0, 2 * PAGE, ZERO);
		fill(again + at, AT(again + at), 2 * PAGE, 100 + round);
		NEED(madvise(again + at + PAGE, PAGE, MADV_DONTNEED) == 0);
		check(again + at, AT(again + at), PAGE, 100 + round);
		check(again + at + PAGE, 0, PAGE, ZERO);
		fill(again + at, AT(again + at), 2 * PAGE, DUMPED);
	}
	check_own(again, MIB(8));
}

/* What cuts a VMA into pieces without any event: protection, locking, advice. Also populate, and residency. */
static void cuts(void)
{
	size_t length = MIB(64);
	char *p = map_filled(length), *populated = map_filled(MIB(16));
	wait_for_dump();
	for (size_t at = 0; at < length; at += KIB(256)) {
		char *piece = p + at + KIB(64);
		switch (at / KIB(256) % 5) {
		case 0:
			NEED(mprotect(piece, KIB(12), PROT_READ) == 0);
			break;
		case 1:
			NEED(mprotect(piece, KIB(12), PROT_NONE) == 0);
			break;
		case 2:
			NEED(madvise(piece, KIB(12), MADV_DONTDUMP) == 0);
			break;
		case 3:
			NEED(madvise(piece, KIB(12), MADV_NOHUGEPAGE) == 0);
			break;
		case 4:
			check_own(piece, KIB(12));
			NEED(mlock(piece, KIB(12)) == 0);
			break;
		}
	}
	NEED(madvise(populated, MIB(4), MADV_POPULATE_READ) == 0);
	NEED(madvise(populated + MIB(4), MIB(4), MADV_POPULATE_WRITE) == 0);
	check_own(populated, MIB(16));
	for (size_t at = 0; at < length; at += KIB(256)) {
		if (at / KIB(256) % 5 == 1)
			NEED(mprotect(p + at + KIB(64), KIB(12), PROT_READ | PROT_WRITE) == 0);
		check_own(p + at, KIB(256));
	}
	for (size_t at = 0; at < length; at += KIB(256))
		if (at / KIB(256) % 5 == 0)
			NEED(mprotect(p + at + KIB(64), KIB(12), PROT_READ | PROT_WRITE) == 0);
	check_shuffled(p, AT(p), length, DUMPED, fresh_seed());
}

static void recurse(size_t frames, bool writing, uint64_t generation)
{
	volatile uint64_t frame[512];
	if (writing)
		for (size_t i = 0; i < 512; i++)
			frame[i] = word_of(frames * 4096 + i * 8, generation);
	if (frames > 1)
		recurse(frames - 1, writing, generation);
	for (size_t i = 0; i < 512; i++)
		if (frame[i] != word_of(frames * 4096 + i * 8, generation))
			fail("bad word on the stack at %p: expected %#lx, got %#lx", (volatile void *)&frame[i],
			     word_of(frames * 4096 + i * 8, generation), frame[i]);
}

/* The dump happens with 2 MiB of live frames; they are checked on the way back. */
static void deep(size_t frames)
{
	volatile uint64_t frame[512];
	for (size_t i = 0; i < 512; i++)
		frame[i] = word_of(frames * 4096 + i * 8, 3);
	if (frames > 1)
		deep(frames - 1);
	else {
		wait_for_dump();
		recurse(700, true, 4); /* deeper than before the dump: fresh stack */
	}
	for (size_t i = 0; i < 512; i++)
		if (frame[i] != word_of(frames * 4096 + i * 8, 3))
			fail("bad word on the old stack at %p: expected %#lx, got %#lx", (volatile void *)&frame[i],
			     word_of(frames * 4096 + i * 8, 3), frame[i]);
}

/* Grow the heap and the stack. */
static void grow(void)
{
	size_t before = MIB(32), after = MIB(64);
	char *heap = sbrk(0);
	heap = (char *)((AT(heap) + PAGE - 1) & ~(PAGE - 1));
	NEED(brk(heap + before) == 0);
	fill_own(heap, before / 2); /* the second half stays untouched */
	char *growsdown = mmap(NULL, MIB(1), PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_STACK, -1, 0);
	NEED(growsdown != MAP_FAILED);
	fill_own(growsdown, MIB(1));
	deep(500);
	NEED(brk(heap + before + after) == 0);
	check_own(heap, MIB(1));
	fill(heap + before + MIB(1), AT(heap), MIB(4), 5);
	check(heap + before / 2, 0, before / 2 + MIB(1), ZERO);
	check(heap + before + MIB(1), AT(heap), MIB(4), 5);
	check(heap + before + MIB(5), 0, after - MIB(5), ZERO);
	check_own(heap, before / 2);
	NEED(brk(heap + before / 4) == 0); /* and shrink, through lazy pages */
	NEED(brk(heap + before) == 0);
	check(heap + before / 4, 0, before - before / 4, ZERO);
	check_own(heap, before / 4);
	check_own(growsdown, MIB(1));
	deep(1); /* the go file is there: this is the recursion alone */
	char *blocks[64];
	for (size_t i = 0; i < 64; i++) {
		blocks[i] = malloc(KIB(4) << i % 8);
		NEED(blocks[i]);
		fill(blocks[i], i, KIB(4) << i % 8, 20 + i);
	}
	for (size_t i = 0; i < 64; i++)
		check(blocks[i], i, KIB(4) << i % 8, 20 + i);
	check_own(heap, before / 4);
}

/*
 * System calls whose buffers are lazy. Not /proc/PID/mem: the kernel does not let its reads wait for a userfaultfd (it
 * faults without FAULT_FLAG_ALLOW_RETRY), so they fail with EIO on a missing page whoever serves it.
 */
static void syscalls(void)
{
	size_t length = MIB(16);
	char *source = map_filled(length), *target = map_filled(length), *remote = map_filled(length);
	char *vectors = map_filled(MIB(1)), *names = map_filled(KIB(64)), *futexes = map_filled(PAGE);
	char path[1200];
	path_of(path, sizeof(path), "data");
	wait_for_dump();
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
	NEED(fd >= 0);
	for (size_t at = 0; at < length;) { /* odd sizes: across pages */
		size_t part = length - at < 77777 ? length - at : 77777;
		ssize_t n = write(fd, source + at, part);
		NEED(n > 0);
		at += (size_t)n;
	}
	NEED(lseek(fd, 0, SEEK_SET) == 0);
	for (size_t at = 0; at < length;) {
		size_t part = length - at < 99991 ? length - at : 99991;
		ssize_t n = read(fd, target + at, part);
		NEED(n > 0);
		at += (size_t)n;
	}
	check(target, AT(source), length, DUMPED);
	check_own(source, length);

	struct iovec *iov = (struct iovec *)vectors;
	for (int i = 0; i < 64; i++)
		iov[i] = (struct iovec){ vectors + KIB(8) * (size_t)(i + 1), KIB(8) };
	NEED(preadv(fd, iov, 64, (off_t)MIB(1)) == (ssize_t)KIB(512));
	check(vectors + KIB(8), AT(source + MIB(1)), KIB(512), DUMPED);
	NEED(close(fd) == 0);
	NEED(unlink(path) == 0);

	NEED(getcwd(names + KIB(8) - 3, KIB(8)));
	struct stat st;
	memcpy(names + KIB(32) - 2, "/", 2);
	NEED(stat(names + KIB(32) - 2, &st) == 0);
	NEED(syscall(SYS_futex, futexes, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0) < 0 && errno == EAGAIN);

	pid_t child = fork();
	NEED(child >= 0);
	if (child == 0) {
		char *copy = map_apart(length);
		for (size_t at = 0; at < length; at += MIB(1)) {
			struct iovec here = { copy + at, MIB(1) }, there = { remote + at, MIB(1) };
			ssize_t n = process_vm_readv(getppid(), &here, 1, &there, 1, 0);
			if (n != (ssize_t)MIB(1))
				fail("process_vm_readv: %zd: %s", n, strerror(errno));
		}
		check(copy, AT(remote), length, DUMPED);
		struct iovec here = { copy, KIB(64) }, there = { remote + MIB(2) + 8, KIB(64) };
		fill(copy, AT(remote), KIB(64), 3);
		NEED(process_vm_writev(getppid(), &here, 1, &there, 1, 0) == (ssize_t)KIB(64));
		check_own(remote, length); /* its own copy is as it was */
		_exit(0);
	}
	reap(child, 0);
	check(remote + MIB(2) + 8, AT(remote), KIB(64), 3);
	check_own(remote, MIB(2) + 8);
	check_own(remote + MIB(2) + 8 + KIB(64), length - MIB(2) - 8 - KIB(64));
}

/* Become another program in the middle. */
static void exec_scenario(void)
{
	static struct reader readers[3];
	static atomic_int start;
	size_t length = MIB(128);
	char *p = map_filled(length);
	start_readers(readers, 3, p, length, &start, &start);
	wait_for_dump();
	nap(20000); /* until criu has let go of every thread: it takes one that is gone for a failure */
	atomic_store(&start, 1);
	check_own(p, MIB(8));
	execl(self, self, "after-exec", dir, (char *)NULL);
	fail("execl: %s", strerror(errno));
}

/* What exec turns into: fresh memory that nothing of the old image may reach. */
static void after_exec(void)
{
	char *p = map_apart(MIB(64));
	check(p, 0, MIB(64), ZERO);
	fill_own(p, MIB(64));
	check_own(p, MIB(64));
}

/* Exit, with threads still reading. */
static void exits(void)
{
	static struct reader readers[3];
	static atomic_int start;
	size_t length = MIB(192);
	char *p = map_filled(length);
	start_readers(readers, 3, p, length, &start, NULL);
	wait_for_dump();
	nap(20000); /* until criu has let go of every thread: it takes one that is gone for a failure */
	atomic_store(&start, 1);
	check_own(p, MIB(4));
	done();
}

/* Be killed; the verdict is out before. */
static void killed(void)
{
	static struct reader readers[3];
	static atomic_int start;
	size_t length = MIB(192);
	char *p = map_filled(length);
	start_readers(readers, 3, p, length, &start, NULL);
	wait_for_dump();
	nap(20000); /* until criu has let go of every thread: it takes one that is gone for a failure */
	atomic_store(&start, 1);
	check_own(p, MIB(4));
	append_result("ok\n");
	kill(getpid(), SIGKILL);
	pause();
}

/* Some of a family are killed or exit in the middle, the rest check everything. */
static void partly_killed(void)
{
	size_t length = MIB(24);
	char *inherited = map_filled(length);
	pid_t children[6];
	for (int i = 0; i < 6; i++) {
		children[i] = fork();
		NEED(children[i] >= 0);
		if (children[i] == 0) {
			char *own = map_filled(length);
			while (!go_given())
				nap(500);
			nap(20000);
			if (i % 3 == 1)
				_exit(0);
			check_own(own, length);
			check_shuffled(inherited, AT(inherited), length, DUMPED, fresh_seed());
			if (i % 3 == 2)
				pause();
			_exit(0);
		}
	}
	nap(400000); /* until all of them poll */
	wait_for_dump();
	nap(20000); /* until criu has let go of every task: it takes one that is gone for a failure */
	for (int i = 2; i < 6; i += 3)
		NEED(kill(children[i], SIGKILL) == 0);
	check_own(inherited, length);
	for (int i = 0; i < 6; i++)
		reap(children[i], i % 3 == 2 ? SIGKILL : 0);
}

static void tree_task(int depth, int *serial, char *inherited, size_t length, atomic_int *shared)
{
	pid_t children[8];
	int count = 0, wanted = depth == 0 ? 7 : depth == 1 ? 3 : depth == 2 ? 1 : 0;
	uint64_t mine = 100 + (uint64_t)*serial;
	size_t own_length = KIB(512);
	char *own = map_apart(own_length);
	fill(own, AT(own), own_length, mine);
	fill(inherited + (size_t)*serial * PAGE, 0, PAGE, mine); /* a page that differs from the parent's */
	for (int i = 0; i < wanted; i++) {
		int next = *serial * 8 + i + 1;
		if (next * (int)PAGE >= (int)length)
			next = next % 100 + 1;
		children[count] = fork();
		NEED(children[count] >= 0);
		if (children[count] == 0) {
			tree_task(depth + 1, &next, inherited, length, shared);
			_exit(0);
		}
		count++;
	}
	pid_t zombie = 0;
	if (depth == 0) {
		zombie = fork();
		NEED(zombie >= 0);
		if (zombie == 0)
			_exit(7);
		siginfo_t info;
		NEED(waitid(P_PID, (id_t)zombie, &info, WEXITED | WNOWAIT) == 0);
		while (atomic_load(shared) < 7 + 7 * 3 + 7 * 3)
			nap(1000);
		wait_for_dump();
	} else {
		atomic_fetch_add(shared, 1);
		while (!go_given())
			nap(2000);
	}
	check(own, AT(own), own_length, mine);
	check(inherited + (size_t)*serial * PAGE, 0, PAGE, mine);
	check_own(inherited + length / 2, length / 2);
	for (int i = 0; i < count; i++)
		reap(children[i], 0);
	if (zombie)
		reap(zombie, 7 << 8);
}

/* 50 tasks in four generations: the root, 7 children, 21 grandchildren, 21 below them; and a zombie beside. */
static void tree(void)
{
	size_t length = MIB(4);
	char *inherited = map_filled(length);
	atomic_int *shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	NEED(shared != MAP_FAILED);
	int serial = 0;
	tree_task(0, &serial, inherited, length, shared);
	NEED(atomic_load(shared) == 49);
}

/* A mapping of 100 GiB with a page here and there. */
static void sparse(void)
{
	size_t length = GIB(100);
	char *p = map_apart(length);
	for (size_t at = 0; at < length; at += MIB(64))
		fill_own(p + at + at / MIB(64) % 1000 * PAGE, PAGE);
	fill_own(p + GIB(50), MIB(4));
	fill_own(p + length - PAGE, PAGE);
	wait_for_dump();
	uint64_t seed = fresh_seed();
	check_own(p + length - PAGE, PAGE);
	for (int i = 0; i < 5000; i++) {
		size_t at =
			next_random(&seed) % (length / MIB(64)) * MIB(64) + (1001 + next_random(&seed) % 1000) * PAGE;
		if (at / MIB(64) != GIB(50) / MIB(64))
			check(p + at, 0, PAGE, ZERO);
	}
	for (size_t at = 0; at < length; at += MIB(64)) {
		if (at == GIB(50))
			continue;
		char *page = p + at + at / MIB(64) % 1000 * PAGE;
		check_own(page, PAGE);
		check(page + PAGE, 0, PAGE, ZERO);
	}
	check_own(p + GIB(50), MIB(4));
	NEED(madvise(p + GIB(10), GIB(30), MADV_DONTNEED) == 0);
	for (size_t at = GIB(10); at < GIB(40); at += MIB(64))
		check(p + at + at / MIB(64) % 1000 * PAGE, 0, PAGE, ZERO);
}

/* Pages that were only read, pages written with zeros, pages never touched, between written ones. */
static void zeros(void)
{
	size_t length = MIB(48);
	char *p = map_apart(length);
	for (size_t page = 0; page < length / PAGE; page++) {
		char *at = p + page * PAGE;
		switch (page % 5) {
		case 0:
			fill_own(at, PAGE);
			break;
		case 1:
			check(at, 0, PAGE, ZERO);
			break;
		case 2:
			memset(at, 0, PAGE);
			break;
		case 3:
			memset(at, 0, PAGE);
			*(uint64_t *)(at + PAGE - 8) = 1; /* all but the last word */
			break;
		}
	}
	wait_for_dump();
	for (int round = 0; round < 2; round++) {
		for (size_t i = 0; i < length / PAGE; i++) {
			size_t page = round ? i : i * 7919 % (length / PAGE);
			char *at = p + page * PAGE;
			if (page % 5 == 0)
				check_own(at, PAGE);
			else
				check(at, 0, PAGE - 8, ZERO);
			if (page % 5 == 3 && *(uint64_t *)(at + PAGE - 8) != 1)
				fail("lost the last word at %p", (void *)at);
		}
	}
	fill(p, AT(p), length, 6);
	check(p, AT(p), length, 6);
}

/* Runs of one to seven pages, used and unused: many short extents. */
static void holes(void)
{
	size_t length = MIB(96);
	char *p = map_apart(length);
	for (int pass = 0; pass < 2; pass++) {
		uint64_t seed = 4711;
		for (size_t at = 0; at < length;) {
			size_t used = (1 + next_random(&seed) % 7) * PAGE, unused = (1 + next_random(&seed) % 7) * PAGE;
			used = used < length - at ? used : length - at;
			unused = unused < length - at - used ? unused : length - at - used;
			if (pass == 0)
				fill_own(p + at, used);
			else {
				check_own(p + at, used);
				check(p + at + used, 0, unused, ZERO);
			}
			at += used + unused;
		}
		if (pass == 0)
			wait_for_dump();
	}
}

/* Thousands of small VMAs of differing protection beside each other. */
static void manyvmas(void)
{
	enum { COUNT = 6000 };
	size_t each = 3 * PAGE;
	char *p = map_filled(COUNT * each);
	for (size_t i = 0; i < COUNT; i += 2)
		NEED(mprotect(p + i * each, each, PROT_READ) == 0);
	wait_for_dump();
	uint64_t seed = fresh_seed();
	for (int i = 0; i < COUNT; i++)
		check_own(p + next_random(&seed) % COUNT * each, each);
	check_own(p, COUNT * each);
	NEED(mprotect(p, COUNT * each, PROT_READ | PROT_WRITE) == 0);
	check_own(p, COUNT * each);
}

/* Kinds of memory that are not lazy, or differ: locked, shared, of a file, huge. */
static void kinds(void)
{
	size_t length = MIB(8);
	char path[1200];
	path_of(path, sizeof(path), "file");
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
	NEED(fd >= 0 && ftruncate(fd, (off_t)length) == 0);
	char *locked = map_filled(MIB(1)), *lazy = map_filled(length);
	NEED(mlock(locked, MIB(1)) == 0);
	char *shared = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	char *file_shared = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	NEED(shared != MAP_FAILED && file_shared != MAP_FAILED);
	fill_own(shared, length);
	fill(file_shared, 0, length, 2);
	char *file_private = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	NEED(file_private != MAP_FAILED);
	fill_own(file_private + MIB(1), MIB(1));
	char *readonly = map_filled(length);
	NEED(mprotect(readonly, length, PROT_READ) == 0);
	char *huge = map_apart(MIB(32));
	NEED(madvise(huge, MIB(32), MADV_HUGEPAGE) == 0);
	fill_own(huge, MIB(16));
	fill(huge + MIB(20), AT(huge), PAGE, DUMPED);
	close(fd);
	wait_for_dump();
	check_own(readonly, length);
	check_own(huge + MIB(10), MIB(2));
	check(huge + MIB(24), 0, MIB(4), ZERO);
	check_own(lazy, length);
	check_own(huge, MIB(16));
	check(huge + MIB(20), AT(huge), PAGE, DUMPED);
	check(huge + MIB(20) + PAGE, 0, MIB(12) - PAGE, ZERO);
	check_own(locked, MIB(1));
	check_own(shared, length);
	check(file_shared, 0, length, 2);
	check(file_private, 0, MIB(1), 2);
	check_own(file_private + MIB(1), MIB(1));
	check(file_private + MIB(2), MIB(2), length - MIB(2), 2);
}

/*
 * Random layout changes over an arena of small units, against a model that knows what every page must hold, while
 * other threads read an area of their own.
 */
enum { UNITS = 768, UNIT_PAGES = 16, PLACES = UNITS * 2 };
#define UNIT (UNIT_PAGES * PAGE)

struct unit {
	bool mapped, moved;
	int place;
	uint64_t base[UNIT_PAGES];
	uint64_t generation[UNIT_PAGES];
};

static struct unit units[UNITS];
static int unit_at[PLACES]; /* -1: nothing there */
static char *arena;

static char *place(int number)
{
	return arena + (size_t)number * UNIT;
}

static void storm_check(int u)
{
	for (size_t i = 0; i < UNIT_PAGES && units[u].mapped; i++)
		check(place(units[u].place) + i * PAGE, units[u].base[i], PAGE, units[u].generation[i]);
}

static void storm_write(int u, size_t page, uint64_t generation)
{
	units[u].base[page] = AT(place(units[u].place)) + page * PAGE;
	units[u].generation[page] = generation;
	fill(place(units[u].place) + page * PAGE, units[u].base[page], PAGE, generation);
}

static void storm_step(uint64_t *seed, uint64_t step)
{
	int u = (int)(next_random(seed) % UNITS), count = 1 + (int)(next_random(seed) % 6);
	size_t first = next_random(seed) % UNIT_PAGES, pages = 1 + next_random(seed) % (UNIT_PAGES - first);
	char *at = place(units[u].place);
	unsigned operation = (unsigned)(next_random(seed) % 8);
	if (!units[u].mapped) {
		int where = units[u].place;
		if (unit_at[where] >= 0)
			return;
		map_at(place(where), UNIT, 0);
		unit_at[where] = u;
		units[u].mapped = true;
		units[u].moved = true;
		for (size_t i = 0; i < UNIT_PAGES; i++)
			units[u].generation[i] = ZERO;
		return;
	}
	switch (operation) {
	case 0:
		storm_check(u);
		break;
	case 1:
		storm_write(u, first, 10 + step);
		break;
	case 2:
		NEED(madvise(at + first * PAGE, pages * PAGE, MADV_DONTNEED) == 0);
		for (size_t i = first; i < first + pages; i++)
			units[u].generation[i] = ZERO;
		break;
	case 3:
		NEED(madvise(at + first * PAGE, pages * PAGE, MADV_FREE) == 0);
		for (size_t i = first; i < first + pages; i++) {
			uint64_t got = *(volatile uint64_t *)(at + i * PAGE);
			if (got && got != word_of(units[u].base[i], units[u].generation[i]))
				fail("step %lu: a freed page at %p holds %#lx", step, (void *)(at + i * PAGE), got);
			storm_write(u, i, 10 + step);
		}
		break;
	case 4: /* unmap this unit and the next that lie behind it untouched, some of them mapped again at once */
		NEED(munmap(at, UNIT) == 0);
		unit_at[units[u].place] = -1;
		units[u].mapped = false;
		if (step % 3)
			storm_step(seed, step + 1);
		break;
	default: { /* move a run that is still one VMA */
		int run = 1;
		while (run < count && u + run < UNITS && !units[u].moved && units[u + run].mapped &&
		       !units[u + run].moved)
			run++;
		int to = (int)(next_random(seed) % (unsigned)(PLACES - run));
		for (int i = 0; i < run; i++)
			if (unit_at[to + i] >= 0)
				return;
		size_t length = (size_t)run * UNIT;
		if (mremap(at, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, place(to)) == MAP_FAILED)
			fail("step %lu: mremap of %d units from %p: %s", step, run, (void *)at, strerror(errno));
		for (int i = 0; i < run; i++) {
			unit_at[units[u + i].place] = -1;
			units[u + i].place = to + i;
			units[u + i].moved = true;
		}
		for (int i = 0; i < run; i++)
			unit_at[to + i] = u + i;
		if (operation == 7)
			storm_check(u);
	}
	}
}

static void storm(void)
{
	static struct reader readers[2];
	static atomic_int start, stop;
	size_t length = MIB(32);
	/* the free half stays reserved, or another mapping would land there */
	arena = mmap(NULL, PLACES * UNIT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	NEED(arena != MAP_FAILED);
	map_at(arena, UNITS * UNIT, 0);
	for (int i = 0; i < PLACES; i++)
		unit_at[i] = i < UNITS ? i : -1;
	for (int i = 0; i < UNITS; i++) {
		units[i] = (struct unit){ .mapped = true, .place = i };
		for (size_t page = 0; page < UNIT_PAGES; page++)
			if ((unsigned)i % 8 != 7) /* some are left untouched */
				storm_write(i, page, DUMPED);
	}
	char *p = map_filled(length);
	start_readers(readers, 2, p, length, &start, &stop);
	wait_for_dump();
	atomic_store(&start, 1);
	uint64_t seed = fresh_seed();
	for (uint64_t step = 0; step < 4000; step++)
		storm_step(&seed, step);
	for (int i = 0; i < UNITS; i++)
		storm_check(i);
	atomic_store(&stop, 1);
	join_readers(readers, 2);
	check_own(p, length);
}

static const struct {
	const char *name;
	void (*run)(void);
} scenarios[] = {
	{ "plain", plain },
	{ "threads", threads },
	{ "forks", forks },
	{ "forkstorm", forkstorm },
	{ "dontfork", dontfork },
	{ "wipeonfork", wipeonfork },
	{ "remap", remap },
	{ "regrow", regrow },
	{ "dontunmap", dontunmap },
	{ "unmap", unmap },
	{ "advise", advise },
	{ "cuts", cuts },
	{ "grow", grow },
	{ "syscalls", syscalls },
	{ "exec", exec_scenario },
	{ "after-exec", after_exec },
	{ "exits", exits },
	{ "killed", killed },
	{ "partly-killed", partly_killed },
	{ "tree", tree },
	{ "sparse", sparse },
	{ "zeros", zeros },
	{ "holes", holes },
	{ "manyvmas", manyvmas },
	{ "kinds", kinds },
	{ "storm", storm },
};

int main(int argc, char **argv)
{
	if (argc != 3) {
		fprintf(stderr, "usage: victim SCENARIO DIR\n");
		return 2;
	}
	scenario = argv[1];
	self = realpath(argv[0], NULL);
	snprintf(dir, sizeof(dir), "%s", argv[2]);
	for (size_t i = 0; i < sizeof(scenarios) / sizeof(scenarios[0]); i++) {
		if (strcmp(scenarios[i].name, scenario) == 0) {
			scenarios[i].run();
			done();
		}
	}
	fprintf(stderr, "victim: no scenario %s\n", scenario);
	return 2;
}
