/* SPDX-License-Identifier: MIT */
/*
 * The program that scripts/bench restores: bench DIR sweep MIB STRIDE random|ordered
 *                                          bench DIR fresh MIB IMAGE_MIB
 *                                          bench DIR gaps AREAS
 *                                          bench DIR crowd MIB THREADS
 *
 * It prepares its memory, creates DIR/ready and polls for DIR/go. Then it times itself, access by access, and writes
 * one JSON object to DIR/result. sweep reads every used page once: every STRIDE-th of MIB is used. fresh writes to
 * MIB of memory that it had before the dump and never touched, half of it heap, half of it inside a mapping that has
 * used pages at both ends; IMAGE_MIB of used memory beside it keep the daemon at work meanwhile. gaps is for attaching:
 * it maps AREAS empty areas of 16 pages, 32 pages apart, from GAPS_BASE on, and then looks at the clock until DIR/go is
 * there: the longest time between two looks (max_us) is how long it was stopped.
 * crowd reads MIB of used pages once, in random order, shared out to THREADS that run from before the dump on.
 *
 * Told by SIGUSR1, a sweep that is not over writes what it has measured so far.
 *
 * An access longer than SLOW_NS counts as a fault that somebody served. Latencies go into buckets of a sixteenth of an
 * octave, so that a percentile is exact to about 4 %.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, SLOW_NS = 1500, SUB = 16, BUCKETS = 64 * SUB };

static char dir[1024];
static uint64_t histogram[BUCKETS];
static uint64_t slow, slowest, wrong;
static uint64_t sweep_began, swept;

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static unsigned bucket_of(uint64_t ns)
{
	if (ns < SUB)
		return (unsigned)ns;
	unsigned octave = 63 - (unsigned)__builtin_clzll(ns);
	return octave * SUB + (unsigned)(ns >> (octave - 4) & (SUB - 1));
}

static uint64_t floor_of(unsigned bucket)
{
	unsigned octave = bucket / SUB;
	return octave < 4 ? bucket : (1ULL << octave) + ((uint64_t)(bucket % SUB) << (octave - 4));
}

static void note(uint64_t ns)
{
	if (ns < SLOW_NS)
		return;
	histogram[bucket_of(ns)]++;
	slow++;
	if (ns > slowest)
		slowest = ns;
}

static uint64_t percentile(uint64_t per_mille)
{
	uint64_t wanted = slow * per_mille / 1000, seen = 0;
	for (unsigned i = 0; i < BUCKETS; i++) {
		seen += histogram[i];
		if (seen > wanted)
			return floor_of(i);
	}
	return slowest;
}

static uint64_t word_of(const void *address)
{
	uint64_t x = (uint64_t)(uintptr_t)address;
	x = (x ^ x >> 33) * 0xff51afd7ed558ccdULL;
	return (x ^ x >> 29) | 1;
}

static void name(char *out, const char *file)
{
	snprintf(out, 1200, "%s/%s", dir, file);
}

static void say_ready(void)
{
	char path[1200];
	name(path, "ready");
	int fd = open(path, O_WRONLY | O_CREAT, 0644);
	if (fd < 0)
		exit(4);
	close(fd);
}

static void wait_for_dump(void)
{
	char path[1200];
	say_ready();
	name(path, "go");
	struct timespec nap = { 0, 200000 };
	do
		nanosleep(&nap, NULL);
	while (access(path, F_OK) != 0);
	memset(histogram, 0, sizeof(histogram)); /* these pages are here before the clock starts */
}

static void report(uint64_t ns, uint64_t accesses)
{
	char path[1200], temporary[1200], text[512];
	name(path, "result");
	name(temporary, "result.new");
	int n = snprintf(text, sizeof(text),
			 "{\"seconds\": %.6f, \"accesses\": %lu, \"faults\": %lu, \"p50_us\": %.2f, \"p99_us\": %.2f, "
			 "\"max_us\": %.2f, \"wrong\": %lu}\n",
			 (double)ns / 1e9, accesses, slow, (double)percentile(500) / 1e3, (double)percentile(990) / 1e3,
			 (double)slowest / 1e3, wrong);
	int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC, 0644);
	if (fd < 0 || write(fd, text, (size_t)n) != n || close(fd) || rename(temporary, path))
		exit(4);
}

/* The sweep is all that this program does then: it does not mind being interrupted in its own. */
static void report_so_far(int number)
{
	(void)number;
	report(now_ns() - sweep_began, swept);
}

static char *map(size_t length)
{
	char *p = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED)
		exit(5);
	return p;
}

static void sweep(size_t length, size_t stride, bool random)
{
	char *p = map(length);
	size_t count = length / PAGE / stride, power = 1;
	stride *= PAGE;
	for (size_t i = 0; i < count; i++)
		*(uint64_t *)(p + i * stride) = word_of(p + i * stride);
	while (power < count)
		power *= 2;
	signal(SIGUSR1, report_so_far);
	wait_for_dump();
	uint64_t before = sweep_began = now_ns();
	size_t at = random ? power / 3 : 0;
	while (swept < count) {
		if (at < count) {
			uint64_t *word = (uint64_t *)(p + at * stride);
			uint64_t got = *(volatile uint64_t *)word, after = now_ns();
			note(after - before);
			if (got != word_of(word))
				wrong++;
			swept++;
			before = now_ns();
		}
		at = random ? (at * 1664525 + 1013904223) & (power - 1) : at + 1;
	}
	signal(SIGUSR1, SIG_IGN);
	report(now_ns() - sweep_began, count);
}

static void fresh(size_t length, size_t used_length)
{
	char *used = map(used_length);
	for (size_t at = 0; at < used_length; at += PAGE)
		*(uint64_t *)(used + at) = word_of(used + at);
	size_t half = length / 2;
	char *heap = sbrk(0);
	heap = (char *)(((uintptr_t)heap + PAGE - 1) & ~(uintptr_t)(PAGE - 1));
	if (brk(heap + half) != 0)
		exit(5);
	char *area = map(half + 2 * PAGE);
	memset(area, 1, PAGE);
	memset(area + half + PAGE, 1, PAGE);
	char *parts[] = { heap, area + PAGE };
	wait_for_dump();
	uint64_t begin = now_ns(), before = begin;
	for (int part = 0; part < 2; part++) {
		for (size_t at = 0; at < half; at += PAGE) {
			uint64_t *word = (uint64_t *)(parts[part] + at);
			*(volatile uint64_t *)word = 1;
			uint64_t after = now_ns();
			note(after - before);
			before = after;
		}
	}
	uint64_t spent = now_ns() - begin;
	for (int part = 0; part < 2; part++)
		for (size_t at = 8; at < half; at += PAGE)
			wrong += *(uint64_t *)(parts[part] + at) != 0;
	for (size_t at = 0; at < used_length; at += PAGE)
		wrong += *(uint64_t *)(used + at) != word_of(used + at);
	report(spent, length / PAGE);
}

/* What the threads of a crowd share, and what each of them has found. */
struct crowd {
	char *memory;
	size_t pages, power, threads;
	pthread_barrier_t start, end;
};

struct reader {
	struct crowd *crowd;
	size_t number;
	uint64_t histogram[BUCKETS], slow, slowest, wrong;
};

static void *read_share(void *argument)
{
	struct reader *me = argument;
	struct crowd *crowd = me->crowd;
	size_t at = crowd->power / 3;
	pthread_barrier_wait(&crowd->start);
	for (size_t i = 0; i < crowd->power; i++) {
		if (at < crowd->pages && i % crowd->threads == me->number) {
			uint64_t *word = (uint64_t *)(crowd->memory + at * PAGE);
			uint64_t before = now_ns(), got = *(volatile uint64_t *)word, ns = now_ns() - before;
			me->wrong += got != word_of(word);
			if (ns >= SLOW_NS) {
				me->histogram[bucket_of(ns)]++;
				me->slow++;
				if (ns > me->slowest)
					me->slowest = ns;
			}
		}
		at = (at * 1664525 + 1013904223) & (crowd->power - 1);
	}
	pthread_barrier_wait(&crowd->end);
	return NULL;
}

static void crowd(size_t length, size_t threads)
{
	static struct crowd all;
	struct reader *readers = calloc(threads, sizeof(*readers));
	all = (struct crowd){ .memory = map(length), .pages = length / PAGE, .power = 1, .threads = threads };
	while (all.power < all.pages)
		all.power *= 2;
	for (size_t i = 0; i < all.pages; i++)
		*(uint64_t *)(all.memory + i * PAGE) = word_of(all.memory + i * PAGE);
	pthread_barrier_init(&all.start, NULL, (unsigned)threads + 1);
	pthread_barrier_init(&all.end, NULL, (unsigned)threads + 1);
	for (size_t i = 0; i < threads; i++) {
		pthread_t thread;
		readers[i].crowd = &all;
		readers[i].number = i;
		if (pthread_create(&thread, NULL, read_share, &readers[i]))
			exit(5);
	}
	wait_for_dump();
	uint64_t begin = now_ns();
	pthread_barrier_wait(&all.start);
	pthread_barrier_wait(&all.end);
	uint64_t spent = now_ns() - begin;
	for (size_t i = 0; i < threads; i++) {
		for (unsigned bucket = 0; bucket < BUCKETS; bucket++)
			histogram[bucket] += readers[i].histogram[bucket];
		slow += readers[i].slow;
		wrong += readers[i].wrong;
		if (readers[i].slowest > slowest)
			slowest = readers[i].slowest;
	}
	report(spent, all.pages);
}

#define GAPS_BASE 0x300000000000UL

static void gaps(size_t areas)
{
	for (size_t i = 0; i < areas; i++) {
		void *at = (void *)(GAPS_BASE + i * 32 * PAGE);
		int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
		if (mmap(at, (size_t)16 * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0) != at)
			exit(5);
	}
	char go[1200];
	name(go, "go");
	say_ready();
	uint64_t begin = now_ns(), before = begin, looks = 0;
	while (looks++ % 1000000 != 0 || access(go, F_OK) != 0) {
		uint64_t after = now_ns();
		note(after - before);
		before = after;
	}
	for (size_t i = 0; i < areas; i++) {
		uint64_t *word = (uint64_t *)(GAPS_BASE + i * 32 * PAGE);
		wrong += *word != (uint64_t)word;
	}
	report(now_ns() - begin, looks);
}

int main(int argc, char **argv)
{
	if (argc < 4)
		return 2;
	snprintf(dir, sizeof(dir), "%s", argv[1]);
	size_t length = (size_t)atol(argv[3]) << 20;
	if (strcmp(argv[2], "sweep") == 0 && argc == 6)
		sweep(length, (size_t)atol(argv[4]), strcmp(argv[5], "random") == 0);
	else if (strcmp(argv[2], "fresh") == 0 && argc == 5)
		fresh(length, (size_t)atol(argv[4]) << 20);
	else if (strcmp(argv[2], "crowd") == 0 && argc == 5)
		crowd(length, (size_t)atol(argv[4]));
	else if (strcmp(argv[2], "gaps") == 0 && argc == 4)
		gaps((size_t)atol(argv[3]));
	else
		return 2;
	return 0;
}
