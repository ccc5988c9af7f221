/* SPDX-License-Identifier: MIT */
/*
 * A task to dump and to measure the dump by: dumpbench DIR full|zeros MIB
 *                                            dumpbench DIR sparse GIB PERMILLE
 *
 * full: MIB of memory filled. zeros: MIB of memory only read. sparse: GIB mapped, PERMILLE of it used in runs of 16
 * pages at random places. It creates DIR/ready; then a thread looks at the clock all the time, so that it knows itself
 * for how long it was stopped.
 *
 * A file DIR/gap asks for the longest time, in microseconds, that it was stopped since it was last asked: it is
 * answered in DIR/answer. A file DIR/rewrite has it write to every hundredth page of its memory, at random, and create
 * DIR/done.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE ((size_t)4096)

static char dir[1024];
static uint64_t longest;
static char *memory;
static size_t memory_pages;

static uint64_t now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static uint64_t next_random(void)
{
	static uint64_t state = 88172645463325252ULL;
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static void fill(char *page)
{
	for (size_t i = 0; i < PAGE; i += 8)
		*(uint64_t *)(void *)(page + i) = next_random() | 1;
}

static void *look_at_the_clock(void *nothing)
{
	uint64_t before = now_us();
	for (;;) {
		struct timespec pause = { 0, 100000 };
		nanosleep(&pause, NULL);
		uint64_t now = now_us();
		if (now - before > __atomic_load_n(&longest, __ATOMIC_RELAXED))
			__atomic_store_n(&longest, now - before, __ATOMIC_RELAXED);
		before = now;
	}
	return nothing;
}

static void path_of(char *out, const char *name)
{
	snprintf(out, 1200, "%s/%s", dir, name);
}

static void create(const char *name, const char *content)
{
	char path[1200], final[1200];
	path_of(path, "unfinished");
	path_of(final, name);
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
	if (fd < 0 || write(fd, content, strlen(content)) < 0)
		_exit(4);
	close(fd);
	rename(path, final);
}

static int asked(const char *name)
{
	char path[1200];
	path_of(path, name);
	return unlink(path) == 0;
}

static char *map(size_t bytes)
{
	char *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (start == MAP_FAILED)
		_exit(5);
	madvise(start, bytes, MADV_NOHUGEPAGE);
	return start;
}

int main(int argc, char **argv)
{
	pthread_t thread;
	if (argc < 4)
		return 2;
	snprintf(dir, sizeof(dir), "%s", argv[1]);
	for (int fd = 3; fd < 256; fd++)
		close(fd);
	size_t amount = strtoul(argv[3], NULL, 10);
	if (!strcmp(argv[2], "sparse")) {
		size_t pages = (amount << 30) / PAGE, used = pages / 1000 * strtoul(argv[4], NULL, 10);
		char *start = map(amount << 30);
		for (size_t i = 0; i < used / 16; i++) {
			char *run = start + next_random() % (pages / 16) * 16 * PAGE;
			for (size_t page = 0; page < 16; page++)
				fill(run + page * PAGE);
		}
	} else {
		memory_pages = (amount << 20) / PAGE;
		memory = map(amount << 20);
		for (size_t page = 0; page < memory_pages; page++) {
			if (!strcmp(argv[2], "zeros"))
				(void)*(volatile char *)(memory + page * PAGE);
			else
				fill(memory + page * PAGE);
		}
	}
	pthread_create(&thread, NULL, look_at_the_clock, NULL);
	create("ready", "");
	for (;;) {
		char text[32];
		struct timespec pause = { 0, 2000000 };
		nanosleep(&pause, NULL);
		if (asked("gap")) {
			snprintf(text, sizeof(text), "%lu\n", __atomic_exchange_n(&longest, 0, __ATOMIC_RELAXED));
			create("answer", text);
		}
		if (asked("rewrite")) {
			for (size_t i = 0; i < memory_pages / 100; i++)
				fill(memory + next_random() % memory_pages * PAGE);
			create("done", "");
		}
	}
}
