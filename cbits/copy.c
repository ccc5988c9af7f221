/* SPDX-License-Identifier: MIT */
/*
 * The bytes of dumped pages: from a stopped task, or a file of shared memory, into a pages image or a socket.
 *
 * While this runs, the task stands still. What it costs was measured for 1 GiB (Linux 6.18, 2 cores, ext4), in time of
 * one processor: 0.52 s from the task by process_vm_readv and into the page cache by pwrite; 0.34 s if the pages are in
 * the page cache before; 0.25 s straight into a mapping of such pages. Splice from /proc/PID/mem is refused. So what
 * costs are new pages in the page cache, and then the second copy. lz_room_make() makes and maps the pages before the
 * task is stopped, which takes 0.3 s; two threads then need 0.14 s. Where there is no room, batches of 256 KiB stay in
 * a core's cache between the two copies.
 *
 * Nothing here touches a mapping of a file: the kernel does, so that a full disk is an error of a system call, and what
 * could not be copied that way is copied the other way, which says what is wrong.
 *
 * process_vm_readv reads what the task may read. What it may not (PROT_NONE) is read from /proc/PID/mem, as a debugger
 * does; what cannot be read there either (a poisoned page) is an error, never zeros.
 */
#define _GNU_SOURCE 1
#include "abi.h"
#include "lz.h"
#include "wire.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define BATCH_BYTES LZ_EARLY_BATCH_BYTES
#define BATCH_PAGES (BATCH_BYTES >> LZ_PAGE_SHIFT)
#define THREADS_MAX 8U
#define BYTES_FOR_A_THREAD (4U << 20)

int lz_room_make(int fd, uint64_t bytes, uint64_t warm_bytes, struct lz_room *room)
{
	void *map;

	while (fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, (off_t)bytes) < 0)
		if (errno != EINTR)
			return -errno;
	if (!warm_bytes)
		return 0;
	if (ftruncate(fd, (off_t)warm_bytes) < 0)
		return -errno;
	map = mmap(NULL, warm_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		return -errno;
	if (madvise(map, warm_bytes, MADV_POPULATE_WRITE) < 0) {
		int error = errno;
		munmap(map, warm_bytes);
		return -error;
	}
	room->map = map;
	room->bytes = warm_bytes;
	return 0;
}

void lz_room_free(struct lz_room *room)
{
	if (room->map)
		munmap(room->map, room->bytes);
	memset(room, 0, sizeof(*room));
}

struct source {
	int pid; /* 0: it is a file */
	int fd;  /* the file, or /proc/PID/mem; -1: could not be opened */
};

/* Pages that are read in one go: at most BATCH_PAGES, in as many pieces as there are runs. */
struct batch {
	struct iovec pieces[BATCH_PAGES];
	uint32_t count;
	uint64_t bytes;
	uint64_t offset; /* in the pages image */
};

struct job {
	struct source source;
	const struct lz_page_pipe *pipe;
	const struct lz_room *room;
	int out;
	struct lz_copy_state *state;
	uint8_t *done;        /* by batch, whether it was copied; NULL: a page that cannot be read is an error */
	pthread_mutex_t lock; /* guards what follows */
	uint64_t run;         /* the next page to be dealt out */
	uint64_t page;
	uint64_t offset;
	int result;
};

static int fail_reading(struct lz_copy_state *state, uint64_t address, int error)
{
	state->address = address;
	state->code = error;
	state->writing = 0;
	return -error;
}

static int fail_writing(struct lz_copy_state *state, int error)
{
	state->code = error;
	state->writing = 1;
	return -error;
}

/* Read one piece from a file or from the memory behind /proc/PID/mem. */
static int read_piece(const struct source *source, uint8_t *to, uint64_t from, uint64_t bytes,
		      struct lz_copy_state *state)
{
	while (bytes) {
		ssize_t got = pread(source->fd, to, bytes, (off_t)from);
		if (got < 0 && errno == EINTR)
			continue;
		if (got == 0 && !source->pid && bytes < LZ_PAGE_SIZE) {
			memset(to, 0, bytes); /* the last page of a file that ends inside it */
			return 0;
		}
		if (got <= 0)
			return fail_reading(state, from, got < 0 ? errno : EIO);
		to += got;
		from += (uint64_t)got;
		bytes -= (uint64_t)got;
	}
	return 0;
}

/* Find the piece that a count of bytes ends in; *into is how far. */
static uint32_t piece_at(const struct batch *batch, uint64_t bytes, uint64_t *into)
{
	uint32_t piece = 0;

	while (bytes >= batch->pieces[piece].iov_len)
		bytes -= batch->pieces[piece++].iov_len;
	*into = bytes;
	return piece;
}

static int read_batch(const struct source *source, const struct batch *batch, uint8_t *to, struct lz_copy_state *state)
{
	uint64_t done = 0;

	if (!source->pid) {
		for (uint32_t i = 0; i < batch->count; i++) {
			int result = read_piece(source, to + done, (uint64_t)(uintptr_t)batch->pieces[i].iov_base,
						batch->pieces[i].iov_len, state);
			if (result < 0)
				return result;
			done += batch->pieces[i].iov_len;
		}
		return 0;
	}
	while (done < batch->bytes) {
		uint64_t into;
		uint32_t piece = piece_at(batch, done, &into);
		struct iovec first = batch->pieces[piece], pieces[BATCH_PAGES];
		struct iovec local = { .iov_base = to + done, .iov_len = batch->bytes - done };
		first.iov_base = (uint8_t *)first.iov_base + into;
		first.iov_len -= into;
		memcpy(pieces, batch->pieces + piece, (batch->count - piece) * sizeof(*pieces));
		pieces[0] = first;
		ssize_t got = process_vm_readv(source->pid, &local, 1, pieces, batch->count - piece, 0);
		if (got > 0) {
			done += (uint64_t)got;
			continue;
		}
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0 && errno != EFAULT)
			return fail_reading(state, (uint64_t)(uintptr_t)first.iov_base, errno);
		/* The rest of this piece, as a debugger reads it: what has one unreadable page has more. */
		if (source->fd < 0)
			return fail_reading(state, (uint64_t)(uintptr_t)first.iov_base, EFAULT);
		int result = read_piece(source, to + done, (uint64_t)(uintptr_t)first.iov_base, first.iov_len, state);
		if (result < 0)
			return result;
		done += first.iov_len;
	}
	return 0;
}

static int write_at(int fd, const uint8_t *from, uint64_t bytes, uint64_t offset, struct lz_copy_state *state)
{
	while (bytes) {
		ssize_t wrote = pwrite(fd, from, bytes, (off_t)offset);
		if (wrote < 0 && errno == EINTR)
			continue;
		if (wrote <= 0)
			return fail_writing(state, wrote < 0 ? errno : ENOSPC);
		from += wrote;
		bytes -= (uint64_t)wrote;
		offset += (uint64_t)wrote;
	}
	return 0;
}

/* Take the next pages; false when there are none left. Called with the lock held, or by one thread alone. */
static bool next_batch(struct job *job, struct batch *batch)
{
	uint32_t room = BATCH_PAGES;

	batch->count = 0;
	batch->offset = job->offset;
	while (room && job->run < job->pipe->count) {
		const struct lz_page_run *run = &job->pipe->runs[job->run];
		uint64_t take = run->pages - job->page;
		if (run->kind != LZ_PAGE_DUMPED || !take) {
			job->run++;
			job->page = 0;
			continue;
		}
		if (take > room)
			take = room;
		batch->pieces[batch->count++] = (struct iovec){
			.iov_base = (void *)(uintptr_t)(run->start + (job->page << LZ_PAGE_SHIFT)),
			.iov_len = take << LZ_PAGE_SHIFT,
		};
		room -= (uint32_t)take;
		job->page += take;
	}
	batch->bytes = (uint64_t)(BATCH_PAGES - room) << LZ_PAGE_SHIFT;
	job->offset += batch->bytes;
	return batch->count != 0;
}

/* Copy a batch straight into the room, if it is all there: whether that worked. */
static bool copy_into_room(const struct job *job, const struct batch *batch)
{
	struct lz_copy_state ignored;

	if (!job->room || batch->offset + batch->bytes > job->room->bytes)
		return false;
	return read_batch(&job->source, batch, job->room->map + batch->offset, &ignored) == 0;
}

static int copy_batch(const struct job *job, const struct batch *batch, uint8_t *bytes, struct lz_copy_state *state)
{
	int result = 0;

	if (__atomic_load_n(&job->state->cancel, __ATOMIC_RELAXED))
		return fail_writing(state, ECANCELED);
	if (!copy_into_room(job, batch)) {
		result = read_batch(&job->source, batch, bytes, state);
		if (result < 0 && job->done)
			return 0; /* the task runs, and may have unmapped it */
		if (result == 0)
			result = write_at(job->out, bytes, batch->bytes, batch->offset, state);
	}
	if (result == 0 && job->done)
		job->done[batch->offset / LZ_EARLY_BATCH_BYTES] = 1;
	return result;
}

static void *copy_batches(void *argument)
{
	struct job *job = argument;
	struct lz_copy_state *state = job->state, own = { 0 };
	struct batch batch;
	uint8_t *bytes = mmap(NULL, BATCH_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int result = bytes == MAP_FAILED ? fail_writing(&own, ENOMEM) : 0;

	while (result == 0) {
		pthread_mutex_lock(&job->lock);
		bool more = job->result == 0 && next_batch(job, &batch);
		pthread_mutex_unlock(&job->lock);
		if (!more)
			break;
		result = copy_batch(job, &batch, bytes, &own);
		if (result == 0)
			__atomic_add_fetch(&state->copied_bytes, batch.bytes, __ATOMIC_RELAXED);
	}
	if (result < 0) {
		pthread_mutex_lock(&job->lock);
		if (job->result == 0) {
			job->result = result;
			state->address = own.address;
			state->code = own.code;
			state->writing = own.writing;
		}
		pthread_mutex_unlock(&job->lock);
	}
	if (bytes != MAP_FAILED)
		munmap(bytes, BATCH_BYTES);
	return NULL;
}

/* Signals are for the caller's thread: handlers of the program around us must not run here. */
static int start_thread(pthread_t *thread, struct job *job)
{
	sigset_t all, before;
	int result;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	result = pthread_create(thread, NULL, copy_batches, job);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return result;
}

static int copy(struct source source, const struct lz_page_pipe *pipe, int out, const struct lz_room *room,
		uint32_t threads, uint8_t *done, struct lz_copy_state *state)
{
	struct job job = { .source = source, .pipe = pipe, .room = room, .out = out, .state = state, .done = done };
	uint64_t useful = (pipe->pages[LZ_PAGE_DUMPED] << LZ_PAGE_SHIFT) / BYTES_FOR_A_THREAD;
	pthread_t others[THREADS_MAX];
	uint32_t started = 0;

	if (threads > THREADS_MAX)
		threads = THREADS_MAX;
	if (threads > useful)
		threads = (uint32_t)useful;
	pthread_mutex_init(&job.lock, NULL);
	/* Fewer threads than asked for are slower, not wrong. */
	while (started + 1 < threads && start_thread(&others[started], &job) == 0)
		started++;
	copy_batches(&job);
	for (uint32_t i = 0; i < started; i++)
		pthread_join(others[i], NULL);
	pthread_mutex_destroy(&job.lock);
	return job.result;
}

static struct source open_source(int pid, int in)
{
	struct source source = { .pid = pid, .fd = in };

	if (pid) {
		char path[64];
		snprintf(path, sizeof(path), "/proc/%d/mem", pid);
		source.fd = open(path, O_RDONLY | O_CLOEXEC);
	}
	return source;
}

static void close_source(const struct source *source)
{
	if (source->pid && source->fd >= 0)
		close(source->fd);
}

int lz_copy_pages(int pid, const struct lz_page_pipe *pipe, int out, const struct lz_room *room, uint32_t threads,
		  struct lz_copy_state *state)
{
	struct source source = open_source(pid, -1);
	int result = copy(source, pipe, out, room, threads, NULL, state);

	close_source(&source);
	return result;
}

int lz_copy_early(int pid, const struct lz_page_pipe *pipe, int out, const struct lz_room *room, uint32_t threads,
		  uint8_t *done, struct lz_copy_state *state)
{
	struct source source = open_source(pid, -1);
	int result = copy(source, pipe, out, room, threads, done, state);

	close_source(&source);
	return result;
}

int lz_copy_file(int in, const struct lz_page_pipe *pipe, int out, const struct lz_room *room, uint32_t threads,
		 struct lz_copy_state *state)
{
	return copy(open_source(0, in), pipe, out, room, threads, NULL, state);
}

/* The message that goes before a run. Returns its length. */
static size_t put_header(uint8_t *at, const struct lz_page_run *run, uint64_t start, uint64_t pages,
			 const struct lz_stream_format *format)
{
	struct lz_message message = { PS_ADD_F, 0, pages, start, format->dst_id };

	if (run->kind == LZ_PAGE_DUMPED)
		message.flags = PE_PRESENT;
	else if (run->kind == LZ_PAGE_PARENT)
		message.flags = PE_PARENT;
	if (run->lazy && (message.flags == PE_PRESENT || (message.flags && format->lazy_holes)))
		message.flags |= PE_LAZY;
	lz_wire_encode(at, format->header_bytes, &message);
	return format->header_bytes;
}

static int send_all(int out, const uint8_t *bytes, uint64_t length, struct lz_copy_state *state)
{
	while (length) {
		ssize_t sent = send(out, bytes, length, MSG_NOSIGNAL);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent <= 0)
			return fail_writing(state, sent < 0 ? errno : EPIPE);
		bytes += sent;
		length -= (uint64_t)sent;
	}
	return 0;
}

/* What is ready to be sent: headers and pages one behind the other. */
struct parcel {
	int out;
	uint8_t *bytes;
	size_t filled;
};

#define PARCEL_BYTES (1U << 20)

static int send_parcel(struct parcel *parcel, struct lz_copy_state *state)
{
	size_t length = parcel->filled;

	parcel->filled = 0;
	if (__atomic_load_n(&state->cancel, __ATOMIC_RELAXED))
		return fail_writing(state, ECANCELED);
	return send_all(parcel->out, parcel->bytes, length, state);
}

/* Add the bytes of a run to parcels, in pieces that one batch holds. */
static int stream_run(const struct source *source, uint64_t start, uint64_t bytes, struct parcel *parcel,
		      struct lz_copy_state *state)
{
	while (bytes) {
		uint64_t take = bytes < BATCH_BYTES ? bytes : BATCH_BYTES;
		struct batch batch = { .count = 1, .bytes = take };
		int result = 0;
		if (PARCEL_BYTES - parcel->filled < take)
			result = send_parcel(parcel, state);
		batch.pieces[0] = (struct iovec){ .iov_base = (void *)(uintptr_t)start, .iov_len = take };
		if (result == 0)
			result = read_batch(source, &batch, parcel->bytes + parcel->filled, state);
		if (result < 0)
			return result;
		parcel->filled += take;
		__atomic_add_fetch(&state->copied_bytes, take, __ATOMIC_RELAXED);
		start += take;
		bytes -= take;
	}
	return 0;
}

static int stream(const struct source *source, const struct lz_page_pipe *pipe, struct parcel *parcel,
		  const struct lz_stream_format *format, struct lz_copy_state *state)
{
	for (uint64_t i = 0; i < pipe->count; i++) {
		const struct lz_page_run *run = &pipe->runs[i];
		uint64_t start = run->start, left = run->pages;
		if (run->kind == LZ_PAGE_ZERO && !format->zero_holes)
			continue;
		while (left) {
			uint64_t pages = left > UINT32_MAX ? UINT32_MAX : left;
			int result = 0;
			if (PARCEL_BYTES - parcel->filled < LZ_HEADER_MAX)
				result = send_parcel(parcel, state);
			parcel->filled += put_header(parcel->bytes + parcel->filled, run, start, pages, format);
			if (result == 0 && run->kind == LZ_PAGE_DUMPED)
				result = stream_run(source, start, pages << LZ_PAGE_SHIFT, parcel, state);
			if (result < 0)
				return result;
			start += pages << LZ_PAGE_SHIFT;
			left -= pages;
		}
	}
	return send_parcel(parcel, state);
}

int lz_stream_pages(int pid, int in, const struct lz_page_pipe *pipe, int out, const struct lz_stream_format *format,
		    struct lz_copy_state *state)
{
	struct source source = open_source(pid, in);
	struct parcel parcel = { .out = out, .bytes = malloc(PARCEL_BYTES) };
	int result;

	assert(format->header_bytes == 24 || format->header_bytes == 32);
	result = parcel.bytes ? stream(&source, pipe, &parcel, format, state) : fail_writing(state, ENOMEM);
	free(parcel.bytes);
	close_source(&source);
	return result;
}
