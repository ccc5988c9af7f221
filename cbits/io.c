/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE 1
#include "io.h"

#include "engine.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>

#ifndef MADV_POPULATE_READ /* 5.14 */
#define MADV_POPULATE_READ 22
#endif

#define MAP_BLOCK (2ULL << 20)
#define MAP_PAUSE_NS 10000
#define MAPPED_BYTES (4ULL << 30) /* 8 MiB of page tables */

void lz_io_init(struct lz_io *io, struct lz_engine *engine)
{
	io->engine = engine;
	pthread_mutex_init(&io->lock, NULL);
	pthread_cond_init(&io->changed, NULL);
}

/* The queued read to do next: urgent ones first, then in turn. */
static struct lz_read *next_read(struct lz_io *io)
{
	struct lz_read *best = NULL;

	for (uint32_t i = 0; i < LZ_READS; i++) {
		struct lz_read *read = &io->read[i];

		if (read->state != LZ_READ_QUEUED)
			continue;
		if (!read->urgent && io->ahead_running >= LZ_READERS - 1)
			continue; /* a reader stays free for faults */
		if (!best || read->urgent > best->urgent || (read->urgent == best->urgent && read->turn < best->turn))
			best = read;
	}
	return best;
}

/*
 * Map what is in memory of the pages images while nobody waits yet: a copy that finds its source unmapped takes a page
 * fault for every 64 KiB, more where the runs of a chain are short, and mincore looks at a mapped page faster.
 * Each step takes the lock of the address space, and whoever wants to map anything in it, if only the stack of a
 * thread, would get it no sooner than 4 ms later (a rwsem, which a lone reader takes before a writer that waits). So
 * there are pauses, for others to come in between.
 */
static void map_resident(struct lz_io *io)
{
	const struct timespec pause = { .tv_nsec = MAP_PAUSE_NS };
	uint64_t left = MAPPED_BYTES;

	for (uint32_t i = 0; i < io->engine->sources; i++) {
		const struct lz_source *source = &io->engine->source[i];

		for (uint64_t at = 0; at < source->size && left; at += MAP_BLOCK) {
			uint64_t length = source->size - at < MAP_BLOCK ? source->size - at : MAP_BLOCK;
			unsigned char there[MAP_BLOCK / LZ_PAGE_SIZE];
			uint64_t pages = (length + LZ_PAGE_SIZE - 1) / LZ_PAGE_SIZE, known = 0;

			if (__atomic_load_n(&io->stopping, __ATOMIC_RELAXED))
				return;
			left -= length < left ? length : left;
			if (mincore((void *)(uintptr_t)(source->map + at), length, there) < 0)
				continue;
			while (known < pages && there[known] & 1)
				known++;
			if (known == pages)
				(void)madvise((void *)(uintptr_t)(source->map + at), length, MADV_POPULATE_READ);
			(void)nanosleep(&pause, NULL);
		}
	}
}

static void *mapper_main(void *argument)
{
	map_resident(argument);
	return NULL;
}

static void *reader_main(void *argument)
{
	struct lz_io *io = argument;

	pthread_mutex_lock(&io->lock);
	while (!io->stopping) {
		struct lz_read *read = next_read(io);
		const struct lz_source *source;
		struct lz_worker *worker;

		if (!read) {
			pthread_cond_wait(&io->changed, &io->lock);
			continue;
		}
		read->state = LZ_READ_RUNNING;
		io->ahead_running += !read->urgent;
		pthread_mutex_unlock(&io->lock);
		source = &io->engine->source[read->source];
		LZ_POINT("before-read", read->start);
		/* One request to the disk for all of it, then the wait for it, page by page. Whether a page can be
		 * read at all is found out by its COPY. */
		(void)posix_fadvise(source->fd, (off_t)read->start, (off_t)(read->end - read->start),
				    POSIX_FADV_WILLNEED);
		(void)madvise((void *)(uintptr_t)(source->map + read->start), read->end - read->start,
			      MADV_POPULATE_READ);
		pthread_mutex_lock(&io->lock);
		worker = read->worker;
		io->ahead_running -= !read->urgent;
		pthread_cond_broadcast(&io->changed);
		read->state = read->urgent ? LZ_READ_DONE : LZ_READ_FREE;
		lz_engine_wake_worker(worker);
	}
	pthread_mutex_unlock(&io->lock);
	return NULL;
}

int lz_io_start(struct lz_io *io)
{
	for (; io->readers < LZ_READERS; io->readers++) {
		int error = pthread_create(&io->reader[io->readers], NULL, reader_main, io);

		if (error)
			return -error;
	}
	return 0;
}

void lz_io_map(struct lz_io *io)
{
	io->maps = !pthread_create(&io->mapper, NULL, mapper_main, io); /* without it all is as well, later */
}

void lz_io_stop(struct lz_io *io)
{
	pthread_mutex_lock(&io->lock);
	__atomic_store_n(&io->stopping, true, __ATOMIC_RELAXED);
	pthread_cond_broadcast(&io->changed);
	pthread_mutex_unlock(&io->lock);
	if (io->maps)
		pthread_join(io->mapper, NULL);
	io->maps = false;
	while (io->readers)
		pthread_join(io->reader[--io->readers], NULL);
}

void lz_io_reset(struct lz_io *io)
{
	io->stopping = false;
	io->ahead_running = 0;
	for (uint32_t i = 0; i < LZ_READS; i++)
		io->read[i].state = LZ_READ_FREE;
}

static uint32_t queue(struct lz_io *io, struct lz_read read)
{
	uint32_t number = LZ_NO_READ;

	for (uint32_t i = 0; i < LZ_READS && io->readers; i++) {
		if (io->read[i].state == LZ_READ_FREE) {
			read.state = LZ_READ_QUEUED;
			read.turn = io->turn++;
			io->read[i] = read;
			pthread_cond_signal(&io->changed);
			number = i;
			break;
		}
	}
	return number;
}

uint32_t lz_io_fetch(struct lz_io *io, struct lz_worker *worker, uint16_t source, uint64_t start, uint64_t end)
{
	uint32_t number;

	pthread_mutex_lock(&io->lock);
	number = queue(
		io, (struct lz_read){ .worker = worker, .source = source, .start = start, .end = end, .urgent = true });
	pthread_mutex_unlock(&io->lock);
	return number;
}

bool lz_io_take(struct lz_io *io, uint32_t number)
{
	bool done;

	pthread_mutex_lock(&io->lock);
	done = io->read[number].state == LZ_READ_DONE;
	if (done)
		io->read[number].state = LZ_READ_FREE;
	pthread_mutex_unlock(&io->lock);
	return done;
}

/* Whether bytes of a source are queued to be read, or being read; under the lock. */
static bool is_read(const struct lz_io *io, uint16_t source, uint64_t start, uint64_t end)
{
	for (uint32_t i = 0; i < LZ_READS; i++) {
		const struct lz_read *read = &io->read[i];

		if ((read->state == LZ_READ_QUEUED || read->state == LZ_READ_RUNNING) && read->source == source &&
		    read->start < end && start < read->end)
			return true;
	}
	return false;
}

bool lz_io_is_reading(struct lz_io *io, uint16_t source, uint64_t offset)
{
	bool result;

	pthread_mutex_lock(&io->lock);
	result = is_read(io, source, offset, offset + 1);
	pthread_mutex_unlock(&io->lock);
	return result;
}

void lz_io_ahead(struct lz_io *io, struct lz_worker *worker, uint16_t source, uint64_t start, uint64_t end)
{
	pthread_mutex_lock(&io->lock);
	if (!is_read(io, source, start, end))
		(void)queue(io, (struct lz_read){ .worker = worker, .source = source, .start = start, .end = end });
	pthread_mutex_unlock(&io->lock);
}
