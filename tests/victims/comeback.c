/* SPDX-License-Identifier: MIT */
/*
 * A task that says when it runs: comeback DIR MIB
 *
 * It fills MIB of memory, creates DIR/ready, and looks at the clock for ever. DIR/clock is mapped shared, so what
 * stands there no dump, restore or rewind changes: nanoseconds of CLOCK_REALTIME (CRIU moves the others), and a wish
 * to rewrite so many pages, which becomes 0 when that is done.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

struct clock {
	volatile uint64_t last, longest, first; /* first: when it ran first after somebody has set that to 0 */
	volatile uint64_t rewrite;
};

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	return (uint64_t)t.tv_sec * 1000000000U + (uint64_t)t.tv_nsec;
}

int main(int argc, char **argv)
{
	char path[1200];
	if (argc != 3)
		return 2;
	size_t bytes = (size_t)atol(argv[2]) << 20;
	char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	snprintf(path, sizeof(path), "%s/clock", argv[1]);
	int fd = open(path, O_RDWR | O_CREAT, 0600);
	if (memory == MAP_FAILED || fd < 0 || ftruncate(fd, 4096))
		return 3;
	struct clock *clock = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (clock == MAP_FAILED)
		return 3;
	close(fd);
	for (size_t i = 0; i < bytes; i += 8)
		*(uint64_t *)(void *)(memory + i) = i * 0x9e3779b97f4a7c15UL | 1;
	clock->last = now();
	snprintf(path, sizeof(path), "%s/ready", argv[1]);
	if (mknod(path, S_IFREG | 0644, 0))
		return 3;
	for (uint64_t x = 1;;) {
		uint64_t at = now(), last = clock->last;
		if (at >= last) { /* else it was looked at before a dump, and this is a rewind to there */
			if (last && at - last > clock->longest)
				clock->longest = at - last;
			clock->last = at;
		}
		if (!clock->first) /* asked before the clock: it is never one from before a dump */
			clock->first = now();
		while (clock->rewrite) {
			x = x * 6364136223846793005UL + 1442695040888963407UL;
			memset(memory + (x >> 16) % (bytes / 4096) * 4096, (int)x, 4096);
			clock->rewrite--;
		}
	}
}
