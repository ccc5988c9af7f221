/* SPDX-License-Identifier: MIT */
/*
 * How fast memory can be filled at all: UFFDIO_COPY of 256 MiB out of the page cache, in runs of 64 pages, by one or
 * more threads, with no fault, no event and no task that runs beside it. Prints the seconds it took.
 *
 *   copybound FILE THREADS       FILE: 256 MiB, made if it is not there
 */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define BYTES (256UL << 20)
#define RUN (64UL * 4096)
#define THREADS 16

static int uffd;
static char *from, *to;

struct part {
	size_t start, end;
};

static void *copy(void *argument)
{
	const struct part *part = argument;

	for (size_t at = part->start; at < part->end; at += RUN) {
		struct uffdio_copy copy = { .dst = (uintptr_t)to + at, .src = (uintptr_t)from + at, .len = RUN };

		if (ioctl(uffd, UFFDIO_COPY, &copy)) {
			perror("UFFDIO_COPY");
			exit(1);
		}
	}
	return NULL;
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

int main(int argc, char **argv)
{
	size_t threads = argc == 3 ? (size_t)atoi(argv[2]) : 0;
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register all = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	struct part part[THREADS];
	pthread_t thread[THREADS];
	int file;
	double begin;

	if (!threads || threads > THREADS || BYTES / RUN % threads)
		return 2;
	file = open(argv[1], O_RDWR | O_CREAT, 0600);
	if (file < 0 || (lseek(file, 0, SEEK_END) < (off_t)BYTES && posix_fallocate(file, 0, (off_t)BYTES)))
		return 1;
	from = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	to = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (from == MAP_FAILED || to == MAP_FAILED)
		return 1;
	for (size_t at = 0; at < BYTES; at += 4096)
		from[at] = 7; /* in the page cache, and mapped */
	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	all.range.start = (uintptr_t)to;
	all.range.len = BYTES;
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &all)) {
		perror("userfaultfd");
		return 1;
	}
	begin = now();
	for (size_t i = 0; i < threads; i++) {
		part[i] = (struct part){ BYTES / threads * i, BYTES / threads * (i + 1) };
		if (pthread_create(&thread[i], NULL, copy, &part[i]))
			return 1;
	}
	for (size_t i = 0; i < threads; i++)
		pthread_join(thread[i], NULL);
	printf("%.6f\n", now() - begin);
	return 0;
}
