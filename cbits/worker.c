/* SPDX-License-Identifier: MIT */
/*
 * A worker: the only reader of the uffds of its tasks, and the only one who installs pages in them.
 *
 * Order of work: every pending message is read; layout events are applied as they are read, before any fault that was
 * read with them; then the faults are answered, each with its own page first; then one bounded chunk of background
 * fill near the last fault; then the queue is looked at again. While there is fill to do a worker does not sleep.
 *
 * What the kernel guarantees, and what follows (fs/userfaultfd.c; seen on 6.18, tests in tests/c and tests/kernel):
 *
 * - A layout change raises mmap_changing under mmap_lock before it happens, queues its event, and lowers it only
 *   when the thread has run again after the event was read. Every COPY and ZEROPAGE in between fails with -EAGAIN.
 *   So with one thread a task nothing can be installed by an outdated layout: what we know when a COPY succeeds is
 *   what was true. A fault whose address we misplace because its event is not queued yet fails the same way, is kept,
 *   and is looked up anew after the event.
 * - read() hands out faults before events, whatever their age. So the queue is drained before a fault is answered.
 * - A woken thread faults again if its page is not there and queues a new message. So UFFDIO_WAKE is always a safe
 *   answer: it is what -EEXIST, -ENOENT and a full list of pending faults get, and what frees the threads that wait
 *   on a range that was moved or unmapped.
 * - UNREGISTER and REGISTER do not look at mmap_changing. A range is handed back only between two moments that the
 *   layout was seen settled with nothing read in between; if a change slipped in, the range is registered again
 *   before its event is read, while the thread that made the change still waits (hand_back).
 * - UNREGISTER of part of a VMA splits it, and an mremap or mprotect-sensitive program sees that: mremap over the cut
 *   fails with EFAULT before Linux 6.17. So, other than the first sketch of the design, a VMA is handed back whole or
 *   not at all; long runs without image bytes inside a VMA that has some are served by ZEROPAGE windows that grow
 *   to 2 MiB, which costs one fault in 512 and no split.
 * - Closing a uffd lets every waiting thread and every later fault read zeros. So it is closed only when no image
 *   page is missing, when the memory is gone, or after every missing page was poisoned.
 */
#define _GNU_SOURCE
#include "engine.h"
#include "uffd.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MESSAGES 64U
#define FAULTS 1024U

#define SPIN_NS 50000U              /* looks for the next fault this long before it blocks */
#define FIRST_BACKOFF_NS 2000U      /* after an EAGAIN: doubles up to the last */
#define LAST_BACKOFF_NS 1000000U
#define SETTLE_NS 30000U            /* waits this long in place for a layout to settle */
#define WATCH_NS 10000U             /* looks closer together than this miss nothing (layout.h, overlapped) */
#define PROBE_NS 50000000U          /* how often an idle task is asked whether it still exists */
#define ACTIVE_NS 1000000U          /* a task that faulted within this time gets small chunks of fill */
#define ACTIVE_CHUNK_PAGES 16U
#define IDLE_CHUNK_PAGES 64U
#define CHUNK_COPIES 16U            /* copies in one chunk, however small */
#define NEAR_PAGES 2048U            /* how far behind a fault the fill looks before it goes on elsewhere */
#define ZERO_WINDOW_PAGES 512U
#define COPY_WINDOW_PAGES 64U
#define RATE_BURST_BYTES (1U << 20)
#define RESIDENT_PAGES 256U         /* asked at once whether they are in memory */
#define AHEAD_BYTES (4ULL << 20)    /* read in one request, and this far before the fill needs it */
#define POISON_TRIES 2000U          /* times 1 ms */

#define PAGES(bytes) ((bytes) >> LZ_PAGE_SHIFT)
#define BYTES(pages) ((uint64_t)(pages) << LZ_PAGE_SHIFT)

enum cause { BY_FAULT, BY_FILL };

static void count(uint64_t *counter, uint64_t n)
{
	__atomic_store_n(counter, *counter + n, __ATOMIC_RELAXED);
}

static void notify(struct lz_worker *worker, struct lz_notice notice)
{
	lz_engine_notify(worker->engine, &notice);
}

static bool is_serving(const struct lz_task *task)
{
	return task->status == LZ_TASK_SERVING;
}

static void forget_left(struct lz_task *task, uint64_t pages)
{
	assert(pages <= task->left_pages);
	__atomic_store_n(&task->left_pages, task->left_pages - pages, __ATOMIC_RELAXED);
}

static void record_latency(struct lz_counters *counters, uint64_t ns)
{
	uint32_t bucket = (uint32_t)ns;

	if (ns >= 16) {
		uint32_t exponent = 63U - (uint32_t)__builtin_clzll(ns);

		bucket = 16U * (exponent - 3U) + (uint32_t)(ns >> (exponent - 4U) & 15U);
		if (bucket >= LZ_LATENCY_BUCKETS)
			bucket = LZ_LATENCY_BUCKETS - 1;
	}
	count(&counters->fault_ns[bucket], 1);
	count(&counters->fault_ns_sum, ns);
	if (ns > counters->fault_ns_max)
		__atomic_store_n(&counters->fault_ns_max, ns, __ATOMIC_RELAXED);
}

/* The life of a task in its worker */

static int adopt(struct lz_worker *worker, struct lz_task *task)
{
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = task };

	if (worker->tasks == worker->task_capacity) {
		uint32_t capacity = worker->task_capacity ? 2 * worker->task_capacity : 64;
		struct lz_task **list = realloc(worker->task, capacity * sizeof(struct lz_task *));

		if (!list)
			return -ENOMEM;
		worker->task = list;
		worker->task_capacity = capacity;
	}
	if (epoll_ctl(worker->epoll, EPOLL_CTL_ADD, task->uffd, &event) < 0)
		return -errno;
	task->backoff_ns = FIRST_BACKOFF_NS;
	task->empty_ns = lz_now_ns();
	worker->task[worker->tasks++] = task;
	return 0;
}

static void end_task(struct lz_worker *worker, struct lz_task *task, enum lz_task_status status,
		     struct lz_notice notice)
{
	uint32_t kept = 0;

	for (uint32_t i = 0; i < worker->tasks; i++) {
		if (worker->task[i] == task) {
			worker->task[i] = worker->task[--worker->tasks];
			break;
		}
	}
	for (uint32_t i = 0; i < worker->pendings; i++) {
		if (worker->pending[i].task != task || worker->pending[i].read != LZ_NO_READ)
			worker->pending[kept++] = worker->pending[i];
	}
	worker->pendings = kept;
	close(task->uffd); /* epoll forgets it with its last descriptor */
	task->uffd = -1;
	lz_space_drop(worker->engine->arena, &task->space);
	__atomic_store_n(&task->status, status, __ATOMIC_RELEASE);
	notice.task = task->number;
	notify(worker, notice);
}

static void apply_batch(struct lz_worker *worker, struct lz_task *task);

static void task_gone(struct lz_worker *worker, struct lz_task *task)
{
	if (task->events)
		apply_batch(worker, task); /* a child that it forked lives on */
	if (!is_serving(task))
		return;
	count(&worker->counters->dropped_pages, task->left_pages);
	forget_left(task, task->left_pages);
	end_task(worker, task, LZ_TASK_GONE, (struct lz_notice){ .kind = LZ_NOTICE_TASK_GONE });
}

static void unsettle(struct lz_worker *worker, struct lz_task *task, uint64_t now)
{
	count(&worker->counters->again, 1);
	task->unsettled_ns = now + task->backoff_ns;
	if (task->backoff_ns < LAST_BACKOFF_NS)
		task->backoff_ns *= 2;
}

static void settle(struct lz_task *task)
{
	task->backoff_ns = FIRST_BACKOFF_NS;
	task->unsettled_ns = 0;
}

/* Pages images */

/*
 * Ask whether a pages image still holds its bytes up to `end`. A page of a mapping that lies beyond the end of its
 * file raises -EFAULT in COPY; but the rest of the last page of a file that was cut inside a page reads as zeros.
 */
static bool source_holds(struct lz_worker *worker, uint16_t number, uint64_t end)
{
	struct lz_source *source = &worker->engine->source[number];
	struct stat status;
	bool same;

	if (fstat(source->fd, &status) < 0)
		return false;
	same = (uint64_t)status.st_size >= source->size && status.st_mtim.tv_sec == source->mtime_s &&
	       status.st_mtim.tv_nsec == source->mtime_ns;
	if (!same && !__atomic_exchange_n(&source->told, 1, __ATOMIC_RELAXED))
		notify(worker, (struct lz_notice){ .kind = LZ_NOTICE_SOURCE_CHANGED,
						   .source = number,
						   .value = (uint64_t)status.st_size });
	return (uint64_t)status.st_size >= end;
}

/*
 * Ask how much of a range of a source, from its start, is in memory; 0 when its first page is not.
 */
static uint64_t resident_bytes(struct lz_worker *worker, uint16_t number, uint64_t start, uint64_t end)
{
	const struct lz_source *source = &worker->engine->source[number];
	unsigned char there[RESIDENT_PAGES];
	uint64_t pages, known = 0;

	if (worker->resident_source == number && worker->resident_start <= start && start < worker->resident_end)
		return (end < worker->resident_end ? end : worker->resident_end) - start;
	/* Small questions are those of faults: nothing says that what follows will be asked. */
	pages = end - start <= BYTES(ACTIVE_CHUNK_PAGES) ? PAGES(end - start) : RESIDENT_PAGES;
	if (pages > PAGES(source->size - start + LZ_PAGE_SIZE - 1))
		pages = PAGES(source->size - start + LZ_PAGE_SIZE - 1);
	if (mincore((void *)(uintptr_t)(source->map + start), BYTES(pages), there) < 0)
		return end - start;
	while (known < pages && there[known] & 1)
		known++;
	if (pages == RESIDENT_PAGES && known) {
		worker->resident_source = number;
		worker->resident_start = start;
		worker->resident_end = start + BYTES(known);
	}
	return BYTES(known) < end - start ? BYTES(known) : end - start;
}

/* Installing pages */

static void mark_present(struct lz_worker *worker, struct lz_task *task, uint64_t start, uint64_t pages)
{
	lz_space_mark(worker->engine->arena, &task->space, start, pages, LZ_PRESENT);
}

/*
 * Poison pages whose bytes cannot be had, and say so. `pages` may be shortened to what one call could do; returns how
 * many pages are dealt with, or -errno as a COPY would.
 */
static int64_t give_up_pages(struct lz_worker *worker, struct lz_task *task, uint64_t start, uint64_t pages,
			     uint16_t source, int error)
{
	struct lz_notice notice = {
		.kind = LZ_NOTICE_UNREADABLE,
		.task = task->number,
		.address = start,
		.source = source,
		.error = error,
	};
	uint64_t done;
	int result = lz_uffd_poison(task->uffd, start, BYTES(pages), &done);

	if (result == -EEXIST && !done) {
		mark_present(worker, task, start, 1);
		forget_left(task, 1);
		lz_uffd_wake(task->uffd, start, LZ_PAGE_SIZE);
		return 1;
	}
	if (result == -EINVAL || result == -ENOTTY) {
		/* A kernel that cannot poison: the page stays missing and its faults blocked. */
		notice.kind = LZ_NOTICE_HELD;
		lz_space_mark(worker->engine->arena, &task->space, start, pages, LZ_ASKED);
		task->held_pages += pages;
		forget_left(task, pages);
		done = BYTES(pages);
	} else if (!done) {
		return result;
	} else {
		mark_present(worker, task, start, PAGES(done));
		count(&worker->counters->poisoned_pages, PAGES(done));
		forget_left(task, PAGES(done));
	}
	notice.value = PAGES(done);
	notify(worker, notice);
	return (int64_t)PAGES(done);
}

/*
 * Install a run of missing dumped pages. 0 when every page of it is dealt with; -EAGAIN or -ENOMEM to try again later,
 * -ESRCH when the memory is gone, other errors when this task cannot be served.
 */
static int install_run(struct lz_worker *worker, struct lz_task *task, const struct lz_run *run, enum cause cause)
{
	struct lz_source *source = &worker->engine->source[run->source];
	struct lz_counters *counters = worker->counters;
	uint64_t start = run->start, offset = run->offset, left = run->pages, most = run->pages;
	uint64_t readable = run->pages;

	if (run->kind != LZ_KIND_DUMPED)
		return give_up_pages(worker, task, start, left, run->source, -EOPNOTSUPP) < 0 ? -EAGAIN : 0;
	if (!source_holds(worker, run->source, offset + BYTES(left))) {
		struct stat status;
		uint64_t size = fstat(source->fd, &status) < 0 ? 0 : (uint64_t)status.st_size;

		readable = size > offset ? PAGES(size - offset) : 0;
		if (readable > left)
			readable = left;
	}
	while (left) {
		uint64_t pages = left < most ? left : most, done;
		int result;

		if (!readable) {
			int64_t given = give_up_pages(worker, task, start, left, run->source, -ENODATA);

			if (given < 0)
				return (int)given;
			start += BYTES(given);
			left -= (uint64_t)given;
			continue;
		}
		if (pages > readable)
			pages = readable;
		LZ_POINT("before-copy", start);
		result = lz_uffd_copy(task->uffd, start, source->map + offset, BYTES(pages), &done);
		if (done) {
			settle(task);
			mark_present(worker, task, start, PAGES(done));
			forget_left(task, PAGES(done));
			count(cause == BY_FAULT ? &counters->fault_copied_pages : &counters->fill_copied_pages,
			      PAGES(done));
			if (!source_holds(worker, run->source, offset + done))
				notify(worker, (struct lz_notice){ .kind = LZ_NOTICE_SUSPECT,
								   .task = task->number,
								   .address = start,
								   .value = PAGES(done),
								   .source = run->source });
			start += done;
			offset += done;
			left -= PAGES(done);
			readable -= PAGES(done);
			continue; /* after a partial copy the next call tells why it stopped */
		}
		switch (result) {
		case -EEXIST:
			/* The restorer filled it. Its faults, if any, were not woken. */
			settle(task);
			mark_present(worker, task, start, 1);
			forget_left(task, 1);
			count(&counters->present_pages, 1);
			lz_uffd_wake(task->uffd, start, LZ_PAGE_SIZE);
			break;
		case -ENOENT:
			if (pages > 1) { /* the range crosses the end of a VMA: an mprotect has split it */
				most = pages / 2;
				continue;
			}
			/* Not registered with us: whoever touches it does not wait for us. */
			settle(task);
			mark_present(worker, task, start, 1);
			forget_left(task, 1);
			lz_uffd_wake(task->uffd, start, LZ_PAGE_SIZE);
			break;
		case -EFAULT: {
			int64_t given = give_up_pages(worker, task, start, 1, run->source, -EIO);

			if (given < 0)
				return (int)given;
			break;
		}
		case -ENOSPC:
			return -ESRCH;
		default:
			return result;
		}
		start += LZ_PAGE_SIZE;
		offset += LZ_PAGE_SIZE;
		left--;
		readable--;
	}
	return 0;
}

/* Map zeros over [start, start + pages): the first page surely, the rest as far as it goes. As install_run. */
static int install_zeros(struct lz_worker *worker, struct lz_task *task, uint64_t start, uint64_t pages)
{
	for (;;) {
		uint64_t done;
		int result;

		LZ_POINT("before-zero", start);
		result = lz_uffd_zero(task->uffd, start, BYTES(pages), &done);
		if (done) {
			settle(task);
			mark_present(worker, task, start, PAGES(done));
			count(&worker->counters->zero_pages, PAGES(done));
			return 0;
		}
		if (result == -EEXIST) {
			settle(task);
			mark_present(worker, task, start, 1);
			count(&worker->counters->present_pages, 1);
			lz_uffd_wake(task->uffd, start, LZ_PAGE_SIZE);
			return 0;
		}
		if (result == -ENOENT && pages > 1) {
			pages /= 2;
			continue;
		}
		if (result == -ENOENT) {
			/* Unmapped or handed back: the thread finds out by itself. */
			lz_uffd_wake(task->uffd, start, LZ_PAGE_SIZE);
			return 0;
		}
		return result == -ENOSPC ? -ESRCH : result;
	}
}

/* Where faults go */

/* Find the forward stream that a fault belongs to, or begin one in the place of the oldest. */
static struct lz_stream *stream_of(struct lz_task *task, uint64_t address)
{
	struct lz_stream *oldest = &task->stream[0];

	task->stream_clock++;
	for (uint32_t i = 0; i < LZ_STREAMS; i++) {
		struct lz_stream *stream = &task->stream[i];

		if (address >= stream->next && address < stream->next + BYTES(16) && stream->next) {
			stream->streak++;
			stream->age = task->stream_clock;
			return stream;
		}
		if (task->stream_clock - stream->age > task->stream_clock - oldest->age)
			oldest = stream;
	}
	*oldest = (struct lz_stream){ .age = task->stream_clock };
	return oldest;
}

static uint64_t window_of(const struct lz_stream *stream, uint64_t most)
{
	uint64_t pages;

	if (!stream->streak)
		return 1;
	pages = 8ULL << (stream->streak < 8 ? stream->streak : 8);
	return pages < most ? pages : most;
}

/*
 * Answer one fault. 0: the thread will go on (or fault again); -EINPROGRESS: its page is being read from a disk, and
 * *read says by which read; else as install_run. *read on the way in is the read that was waited for, or LZ_NO_READ.
 */
static int answer(struct lz_worker *worker, struct lz_task *task, uint64_t address, uint32_t *read)
{
	struct lz_arena *arena = worker->engine->arena;
	struct lz_space *space = &task->space;
	const int64_t number = lz_space_find(arena, space, address);
	const struct lz_region *region;
	const struct lz_extent *extent;
	struct lz_stream *stream;
	uint64_t image_address, page, pages, gap_end = 0;
	enum lz_state state;
	int result;

	if (number < 0) {
		/* Memory that a VMA of ours has grown by: zeros, and no state. Up to the next region. */
		uint64_t end = LZ_USER_END;

		for (uint32_t low = 0, high = space->regions; low < high;) {
			uint32_t middle = low + (high - low) / 2;
			uint64_t start = lz_space_region(arena, space, middle)->start;

			if (start > address) {
				end = start;
				high = middle;
			} else {
				low = middle + 1;
			}
		}
		stream = stream_of(task, address);
		pages = window_of(stream, ZERO_WINDOW_PAGES);
		if (pages > PAGES(end - address))
			pages = PAGES(end - address);
		result = install_zeros(worker, task, address, pages);
		stream->next = address + BYTES(pages);
		return result;
	}

	region = lz_space_region(arena, space, (uint32_t)number);
	page = PAGES(address - region->start);
	image_address = region->image_start + (address - region->start);
	state = lz_space_state(arena, space, address);
	if (state == LZ_PRESENT) {
		/* Another thread's fault brought it, between the fault and its message. */
		count(&worker->counters->present_pages, 1);
		lz_uffd_wake(task->uffd, address, LZ_PAGE_SIZE);
		return 0;
	}
	if (state == LZ_ASKED)
		return 0; /* held back: nothing can be given */

	stream = stream_of(task, address);
	extent = lz_space_extent(arena, space, image_address, &gap_end);
	if (state == LZ_REMOVED || !extent || extent->kind == LZ_KIND_ZERO) {
		if (state == LZ_REMOVED) {
			uint64_t most = window_of(stream, ZERO_WINDOW_PAGES);

			for (pages = 1; pages < most && page + pages < region->pages; pages++) {
				if (lz_space_state(arena, space, address + BYTES(pages)) != LZ_REMOVED)
					break;
			}
		} else {
			if (extent)
				gap_end = extent->start + BYTES(extent->pages);
			pages = PAGES(gap_end - image_address);
			if (pages > region->pages - page)
				pages = region->pages - page;
			if (pages > window_of(stream, ZERO_WINDOW_PAGES))
				pages = window_of(stream, ZERO_WINDOW_PAGES);
			pages = lz_space_state_run(arena, space, region, page, pages, true);
		}
		stream->next = address + BYTES(pages);
		return install_zeros(worker, task, address, pages);
	}

	struct lz_run run;

	pages = window_of(stream, COPY_WINDOW_PAGES);
	if (!lz_space_next_missing(arena, space, (uint32_t)number, page, page + 1, 1, &run))
		return -EUCLEAN; /* the state said missing and the table has it */
	if (pages > 1 && lz_space_next_missing(arena, space, (uint32_t)number, page, page + pages, pages, &run))
		pages = run.pages;
	if (run.kind == LZ_KIND_DUMPED) {
		uint64_t there = resident_bytes(worker, run.source, run.offset, run.offset + BYTES(run.pages));

		if (!there && *read == LZ_NO_READ) {
			/* From a disk: somebody else waits for it. With no one free, or after that, we do. */
			uint64_t block = run.offset & ~(BYTES(ACTIVE_CHUNK_PAGES) - 1);
			uint64_t end = block + BYTES(ACTIVE_CHUNK_PAGES);
			uint64_t size = worker->engine->source[run.source].size;

			*read = lz_io_fetch(&worker->engine->io, worker, run.source, block, end < size ? end : size);
			if (*read != LZ_NO_READ)
				return -EINPROGRESS;
		}
		run.pages = there ? PAGES(there) : 1;
		pages = run.pages;
	}
	stream->next = address + BYTES(pages);
	result = install_run(worker, task, &run, BY_FAULT);
	if (!is_serving(task))
		return result;
	/* What is around it goes next: the block it is in, or, in a stream, what follows. */
	task->near = stream->streak ? stream->next : address & ~(BYTES(16) - 1);
	if (task->near < region->start)
		task->near = region->start;
	return result;
}

/* Put a fault aside that cannot be answered yet. */
static void hold_fault(struct lz_worker *worker, struct lz_task *task, uint64_t address, uint64_t since,
		       uint32_t read)
{
	for (uint32_t i = 0; i < worker->pendings; i++) {
		if (worker->pending[i].task == task && worker->pending[i].address == address && read == LZ_NO_READ)
			return;
	}
	if (worker->pendings == LZ_PENDING && read == LZ_NO_READ) {
		lz_uffd_wake(task->uffd, address, LZ_PAGE_SIZE); /* it will ask again */
		return;
	}
	worker->pending[worker->pendings++] =
		(struct lz_pending){ .task = task, .address = address, .since_ns = since, .read = read };
}

static void fail_task(struct lz_worker *worker, struct lz_task *task, int error);

/* Deal with what an attempt to install something said. True when it is not to be tried again. */
static bool settle_outcome(struct lz_worker *worker, struct lz_task *task, int result)
{
	switch (result) {
	case 0:
		return true;
	case -EINPROGRESS:
		return false;
	case -EAGAIN:
	case -ENOMEM: /* the task is at the limit of its control group: it may free some, or be killed */
	case -EBUSY:
		unsettle(worker, task, lz_now_ns());
		return false;
	case -ESRCH:
		task_gone(worker, task);
		return true;
	default:
		fail_task(worker, task, result);
		return true;
	}
}

static void answer_or_hold(struct lz_worker *worker, struct lz_task *task, uint64_t address, uint64_t since,
			   uint32_t read)
{
	const bool was_read = read != LZ_NO_READ;
	int result;

	if (!is_serving(task))
		return;
	if (task->events) {
		hold_fault(worker, task, address, since, LZ_NO_READ); /* nothing can be installed now */
		return;
	}
	result = answer(worker, task, address, &read);
	if (!settle_outcome(worker, task, result)) {
		hold_fault(worker, task, address, since, was_read ? LZ_NO_READ : read);
		return;
	}
	if (is_serving(task)) {
		uint64_t now = lz_now_ns();

		task->fault_ns = now;
		record_latency(worker->counters, now - since);
	}
}

/* Layout events */

static void drop_range(struct lz_worker *worker, struct lz_task *task, uint64_t start, uint64_t end)
{
	uint64_t dropped = lz_space_count_missing(worker->engine->arena, &task->space, start, end);

	count(&worker->counters->dropped_pages, dropped);
	forget_left(task, dropped);
}

/* Poison what a new uffd would leave missing, by the parent's knowledge, when there is no memory to serve it. */
static int64_t poison_missing(struct lz_worker *worker, struct lz_task *task, int uffd);

static void apply_fork(struct lz_worker *worker, struct lz_task *task, int uffd)
{
	struct lz_engine *engine = worker->engine;
	struct lz_task like = {
		.image_pid = task->image_pid,
		.parent = (int32_t)task->number,
		.uffd = uffd,
		.status = LZ_TASK_SERVING,
		.worker = worker->number,
		.image_pages = task->left_pages,
		.left_pages = task->left_pages,
		.handed_back = task->handed_back,
	};
	struct lz_task *child = NULL;
	int result;

	count(&worker->counters->forks, 1);
	result = lz_space_fork(engine->arena, &task->space, &like.space);
	if (!result) {
		result = lz_engine_add_task(engine, &like, &child);
		if (result)
			lz_space_drop(engine->arena, &like.space);
	}
	if (!result)
		result = adopt(worker, child);
	if (!result) {
		__atomic_add_fetch(&engine->attached, 1, __ATOMIC_RELAXED);
		notify(worker, (struct lz_notice){ .kind = LZ_NOTICE_FORKED,
						   .task = child->number,
						   .value = task->number });
		return;
	}
	/* No room for it: it must not read zeros. */
	poison_missing(worker, task, uffd);
	close(uffd);
	if (child) {
		child->uffd = -1;
		__atomic_store_n(&child->status, LZ_TASK_FAILED, __ATOMIC_RELEASE);
	}
	notify(worker, (struct lz_notice){ .kind = LZ_NOTICE_TASK_FAILED,
					   .task = child ? child->number : task->number,
					   .error = result });
}

static void apply_event(struct lz_worker *worker, struct lz_task *task, const struct lz_event *event)
{
	struct lz_arena *arena = worker->engine->arena;
	int result = 0;

	switch (event->event) {
	case UFFD_EVENT_FORK:
		apply_fork(worker, task, event->uffd);
		break;
	case UFFD_EVENT_REMAP:
		drop_range(worker, task, event->to, event->to + (event->end - event->start));
		result = lz_space_remap(arena, &task->space, event->start, event->to, event->end - event->start);
		lz_uffd_wake(task->uffd, event->start, event->end - event->start);
		break;
	case UFFD_EVENT_REMOVE:
		drop_range(worker, task, event->start, event->end);
		lz_space_remove(arena, &task->space, event->start, event->end);
		break;
	default: /* UFFD_EVENT_UNMAP */
		drop_range(worker, task, event->start, event->end);
		result = lz_space_unmap(arena, &task->space, event->start, event->end);
		lz_uffd_wake(task->uffd, event->start, event->end - event->start);
	}
	if (result < 0 && is_serving(task))
		fail_task(worker, task, result);
}

struct question {
	struct lz_worker *worker;
	struct lz_task *task;
};

static enum lz_truth registered(void *context, int child, uint64_t address)
{
	const struct question *question = context;
	struct lz_task *task = question->task;
	int result;

	if (child == LZ_BEFORE)
		return lz_space_find(question->worker->engine->arena, &task->space, address) < 0 ? LZ_UNKNOWN :
												   LZ_REGISTERED;
	result = lz_uffd_probe(child < 0 ? task->uffd : task->event[child].uffd, address, LZ_PAGE_SIZE);
	return result == -EFAULT ? LZ_REGISTERED : result == -ENOENT ? LZ_NOT_REGISTERED : LZ_UNKNOWN;
}

/* Apply the batch of events; the layout is settled, or the order does not matter any more. */
static void apply_batch(struct lz_worker *worker, struct lz_task *task)
{
	struct question question = { worker, task };
	struct lz_event batch[LZ_BATCH];
	uint8_t order[LZ_BATCH];
	uint32_t count = task->events;

	lz_layout_order(task->event, count, registered, &question, order);
	memcpy(batch, task->event, sizeof(batch));
	task->events = 0;
	worker->outstanding--;
	task->fill_region = 0;
	task->near = 0;
	settle(task);
	for (uint32_t i = 0; i < count; i++) {
		if (is_serving(task))
			apply_event(worker, task, &batch[order[i]]);
		else if (batch[order[i]].event == UFFD_EVENT_FORK) /* no longer known what it has: it waits for ever */
			notify(worker, (struct lz_notice){ .kind = LZ_NOTICE_HELD, .task = task->number });
	}
}

static void keep_event(struct lz_worker *worker, struct lz_task *task, const struct uffd_msg *message, uint64_t now)
{
	struct lz_event event = { .event = message->event, .uffd = -1 };

	LZ_POINT("event-read", message->event);
	switch (message->event) {
	case UFFD_EVENT_FORK:
		event.uffd = (int)message->arg.fork.ufd;
		event.overlapped = task->events && now - task->watched_ns < WATCH_NS;
		break;
	case UFFD_EVENT_REMAP:
		event.start = message->arg.remap.from;
		event.end = event.start + message->arg.remap.len;
		event.to = message->arg.remap.to;
		count(&worker->counters->remaps, 1);
		break;
	case UFFD_EVENT_REMOVE:
	case UFFD_EVENT_UNMAP:
		event.start = message->arg.remove.start;
		event.end = message->arg.remove.end;
		count(message->event == UFFD_EVENT_REMOVE ? &worker->counters->removes : &worker->counters->unmaps, 1);
		break;
	default:
		fail_task(worker, task, -EPROTO);
		return;
	}
	if (task->events == LZ_BATCH)
		apply_batch(worker, task);
	if (!is_serving(task))
		return;
	if (!task->events)
		worker->outstanding++;
	if (!task->events || now - task->watched_ns < WATCH_NS)
		task->watched_ns = now;
	task->event[task->events++] = event;
}

/*
 * Drain a task's queue: layout events are kept in its batch, the addresses of faults returned. What finds no room is
 * woken to ask again.
 */
static uint32_t read_messages(struct lz_worker *worker, struct lz_task *task, uint64_t *faults, uint32_t room)
{
	struct uffd_msg message[MESSAGES];
	uint32_t found = 0;

	while (is_serving(task)) {
		uint64_t before = lz_now_ns();
		ssize_t got = read(task->uffd, message, sizeof(message));

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0 && (errno == EMFILE || errno == ENFILE)) {
			/* A fork waits for a descriptor. */
			if (lz_engine_spend_reserve(worker->engine))
				continue;
			unsettle(worker, task, before);
			break;
		}
		if (got <= 0) {
			task->empty_ns = before;
			break;
		}
		for (uint32_t i = 0; i < (size_t)got / sizeof(message[0]) && is_serving(task); i++) {
			if (message[i].event != UFFD_EVENT_PAGEFAULT) {
				keep_event(worker, task, &message[i], before);
				continue;
			}
			uint64_t address = message[i].arg.pagefault.address & ~(LZ_PAGE_SIZE - 1);

			count(&worker->counters->faults, 1);
			if (found < room)
				faults[found++] = address;
			else
				lz_uffd_wake(task->uffd, address, LZ_PAGE_SIZE);
		}
	}
	return found;
}

/*
 * Look whether the layout has settled, and apply the batch when it has. True when no event is outstanding.
 */
static bool settle_batch(struct lz_worker *worker, struct lz_task *task)
{
	uint64_t now;

	if (!task->events)
		return true;
	now = lz_now_ns();
	switch (lz_uffd_settled(task->uffd)) {
	case -EAGAIN:
		/* A look that came late may have missed that it was settled in between. */
		if (now - task->watched_ns < WATCH_NS)
			task->watched_ns = now;
		return false;
	default: /* settled, or the memory is gone: a child that it forked is not */
		apply_batch(worker, task);
		return true;
	}
}

static void serve(struct lz_worker *worker, struct lz_task *task)
{
	uint64_t faults[FAULTS];
	uint64_t since = task->empty_ns;
	uint32_t found = read_messages(worker, task, faults, FAULTS);

	if (is_serving(task) && task->events) {
		/* The thread that waits for us needs a few µs to go on. */
		uint64_t until = lz_now_ns() + SETTLE_NS;

		while (is_serving(task) && !settle_batch(worker, task)) {
			found += read_messages(worker, task, &faults[found], FAULTS - found);
			if (lz_now_ns() < until)
				continue;
			unsettle(worker, task, lz_now_ns());
			break;
		}
	}
	for (uint32_t i = 0; i < found; i++)
		answer_or_hold(worker, task, faults[i], since, LZ_NO_READ);
}

/* Look again at the layouts that had not settled. */
static void serve_outstanding(struct lz_worker *worker, uint64_t now)
{
	for (uint32_t i = worker->tasks; i-- > 0;) {
		struct lz_task *task = worker->task[i];

		if (task->events && now >= task->unsettled_ns)
			serve(worker, task);
	}
}

static void retry_pending(struct lz_worker *worker, uint64_t now)
{
	uint32_t due = worker->pendings;

	for (uint32_t i = 0; i < due && i < worker->pendings;) {
		struct lz_pending pending = worker->pending[i];

		if (now < pending.task->unsettled_ns ||
		    (pending.read != LZ_NO_READ && !lz_io_take(&worker->engine->io, pending.read))) {
			i++;
			continue;
		}
		worker->pending[i] = worker->pending[--worker->pendings];
		if (due > worker->pendings)
			due = worker->pendings;
		answer_or_hold(worker, pending.task, pending.address, pending.since_ns, pending.read);
	}
}

/* Ending without all bytes */

/* Poison every missing image page of a task's space through a uffd. Returns how many could not be. */
static int64_t poison_missing(struct lz_worker *worker, struct lz_task *task, int uffd)
{
	struct lz_arena *arena = worker->engine->arena;
	uint32_t tries = POISON_TRIES;
	int64_t missed = 0;

	for (uint32_t i = 0; i < task->space.regions; i++) {
		const struct lz_region *region = lz_space_region(arena, &task->space, i);
		uint64_t page = 0, most = UINT64_MAX;
		struct lz_run run;

		while (lz_space_next_missing(arena, &task->space, i, page, region->pages, most, &run)) {
			uint64_t done;
			int result = lz_uffd_poison(uffd, run.start, BYTES(run.pages), &done);

			if (done) {
				count(&worker->counters->poisoned_pages, PAGES(done));
				page = run.page + PAGES(done);
				continue;
			}
			if (result == -ESRCH)
				return 0;
			if (result == -EAGAIN && tries) {
				struct timespec pause = { .tv_nsec = 1000000 };

				tries--;
				if (uffd == task->uffd) {
					read_messages(worker, task, NULL, 0);
					if (is_serving(task))
						settle_batch(worker, task);
					i = 0; /* the layout may have changed */
					page = 0;
					region = lz_space_region(arena, &task->space, i);
					if (!is_serving(task) || !region)
						return missed;
				}
				nanosleep(&pause, NULL);
				continue;
			}
			if (result == -ENOENT && run.pages > 1) {
				most = run.pages / 2;
				continue;
			}
			if (result != -EEXIST && result != -ENOENT)
				missed += (int64_t)run.pages;
			page = run.page + (result == -EEXIST || result == -ENOENT ? 1 : run.pages);
		}
	}
	return missed;
}

static void fail_task(struct lz_worker *worker, struct lz_task *task, int error)
{
	int64_t missed;

	if (task->events)
		apply_batch(worker, task);
	if (!is_serving(task))
		return;
	missed = poison_missing(worker, task, task->uffd);

	if (is_serving(task))
		end_task(worker, task, LZ_TASK_FAILED,
			 (struct lz_notice){ .kind = LZ_NOTICE_TASK_FAILED,
					     .error = error,
					     .value = (uint64_t)missed });
}

/* Background */

/* Give a done block back to the kernel. See the head of this file for why it is done in this order. */
static void hand_back(struct lz_worker *worker, struct lz_task *task, uint32_t number)
{
	struct lz_arena *arena = worker->engine->arena;
	const struct lz_region *region;
	uint32_t first, regions;
	uint64_t start, end;

	if (!lz_space_done_block(arena, &task->space, number, &first, &regions) || regions == task->space.regions)
		return;
	start = lz_space_region(arena, &task->space, first)->start;
	region = lz_space_region(arena, &task->space, first + regions - 1);
	end = region->start + BYTES(region->pages);
	if (lz_uffd_settled(task->uffd) < 0)
		return;
	/* A VMA that reaches past what we know would be split. */
	if (lz_uffd_probe(task->uffd, start - LZ_PAGE_SIZE, 2 * LZ_PAGE_SIZE) == -EFAULT ||
	    lz_uffd_probe(task->uffd, end - LZ_PAGE_SIZE, 2 * LZ_PAGE_SIZE) == -EFAULT)
		return;
	LZ_POINT("before-unregister", start);
	if (lz_uffd_unregister(task->uffd, start, end - start) < 0)
		return;
	LZ_POINT("after-unregister", start);
	if (lz_uffd_settled(task->uffd) < 0) {
		(void)lz_uffd_register(task->uffd, start, end - start);
		return;
	}
	count(&worker->counters->unregistered_pages, PAGES(end - start));
	(void)lz_space_unmap(arena, &task->space, start, end); /* ends at region ends: nothing is cut */
	task->fill_region = 0;
}

/*
 * Advance over what is installed already; returns true and the next missing run of the base fill, or false when no
 * image page of the task is missing.
 */
static bool next_to_fill(struct lz_worker *worker, struct lz_task *task, uint64_t most, struct lz_run *run,
			 uint32_t *number)
{
	struct lz_arena *arena = worker->engine->arena;

	for (uint32_t i = task->fill_region; i < task->space.regions; i++) {
		struct lz_region *region = LZ_AT(arena, struct lz_region, task->space.regions_offset) + i;

		if (region->flags & LZ_REGION_DONE)
			continue;
		if (lz_space_next_missing(arena, &task->space, i, region->fill_page, region->pages, most, run)) {
			region->fill_page = run->page;
			task->fill_region = i;
			*number = i;
			return true;
		}
		region->fill_page = region->pages;
		region->flags |= LZ_REGION_DONE;
		if (__atomic_load_n(&worker->engine->finished, __ATOMIC_ACQUIRE)) {
			uint32_t regions = task->space.regions;

			hand_back(worker, task, i);
			if (task->space.regions != regions)
				i = UINT32_MAX; /* the numbers have changed: once more from the first */
		}
	}
	return false;
}

/* The first look after the restore is finished: VMAs without image bytes go back at once. */
static void hand_back_empty(struct lz_worker *worker, struct lz_task *task)
{
	struct lz_arena *arena = worker->engine->arena;
	struct lz_run run;

	task->handed_back = 1;
	for (uint32_t i = 0; i < task->space.regions; i++) {
		struct lz_region *region = LZ_AT(arena, struct lz_region, task->space.regions_offset) + i;

		if (!lz_space_next_missing(arena, &task->space, i, region->fill_page, region->pages, 1, &run))
			region->flags |= LZ_REGION_DONE;
	}
	for (uint32_t i = task->space.regions; i-- > 0;) {
		if (i < task->space.regions)
			hand_back(worker, task, i);
	}
}

/* Nothing is missing any more: close the uffd, unless a page is held back whose faults must stay blocked. */
static bool task_filled(struct lz_worker *worker, struct lz_task *task)
{
	if (task->held_pages)
		return false;
	end_task(worker, task, LZ_TASK_FILLED, (struct lz_notice){ .kind = LZ_NOTICE_TASK_FILLED });
	return true;
}

/* How many bytes of background fill the rate allows now; UINT64_MAX without a limit. */
static uint64_t fill_allowance(struct lz_engine *engine, uint64_t now)
{
	uint64_t rate = __atomic_load_n(&engine->fill_rate, __ATOMIC_RELAXED), earned, spent;

	if (!rate)
		return UINT64_MAX;
	earned = (uint64_t)((double)(now - engine->fill_start_ns) * 1e-9 * (double)rate) + RATE_BURST_BYTES / 16;
	spent = __atomic_load_n(&engine->fill_spent, __ATOMIC_RELAXED);
	if (earned > spent + RATE_BURST_BYTES) {
		/* What an idle time earned is not saved up. */
		__atomic_compare_exchange_n(&engine->fill_spent, &spent, earned - RATE_BURST_BYTES, false,
					    __ATOMIC_RELAXED, __ATOMIC_RELAXED);
		return RATE_BURST_BYTES;
	}
	return earned > spent ? earned - spent : 0;
}

/*
 * Shorten a run to what is in memory, and have what the fill needs next read ahead. False when nothing of it is there.
 */
static bool fetched_for_fill(struct lz_worker *worker, struct lz_run *run, bool in_order)
{
	struct lz_io *io = &worker->engine->io;
	const uint64_t size = worker->engine->source[run->source].size;
	const uint64_t known = worker->resident_source == run->source ? worker->resident_end : 0;
	uint64_t end = run->offset + BYTES(run->pages);
	uint64_t ahead = run->offset + AHEAD_BYTES, there;

	/* A fill in order asks for a window at a time, one that follows random faults for no more than it needs. */
	if (in_order && end < run->offset + BYTES(RESIDENT_PAGES))
		end = run->offset + BYTES(RESIDENT_PAGES) < size ? run->offset + BYTES(RESIDENT_PAGES) : size;
	there = resident_bytes(worker, run->source, run->offset, end);
	if (!there) {
		lz_io_ahead(io, worker, run->source, run->offset, ahead < size ? ahead : size);
		return false;
	}
	if (worker->resident_end != known && ahead < size) { /* once a window */
		unsigned char is_there;
		const uint8_t *map = worker->engine->source[run->source].map;

		if (!mincore((void *)(uintptr_t)(map + ahead), LZ_PAGE_SIZE, &is_there) && !(is_there & 1))
			lz_io_ahead(io, worker, run->source, ahead,
				    ahead + AHEAD_BYTES < size ? ahead + AHEAD_BYTES : size);
	}
	if (BYTES(run->pages) > there)
		run->pages = PAGES(there);
	return true;
}

/* One bounded chunk of background fill for a task. True when something was done. */
static bool fill_task(struct lz_worker *worker, struct lz_task *task, uint64_t now)
{
	struct lz_engine *engine = worker->engine;
	struct lz_arena *arena = engine->arena;
	uint64_t budget = now - task->fault_ns < ACTIVE_NS ? ACTIVE_CHUNK_PAGES : IDLE_CHUNK_PAGES;
	uint64_t allowance = fill_allowance(engine, now), filled = 0;

	if (allowance < LZ_PAGE_SIZE)
		return false;
	if (budget > PAGES(allowance))
		budget = PAGES(allowance);
	for (uint32_t copies = 0; copies < CHUNK_COPIES && filled < budget; copies++) {
		struct lz_run run;
		uint32_t number = 0;
		int64_t near = task->near ? lz_space_find(arena, &task->space, task->near) : -1;
		bool found = false;
		int result;

		if (near >= 0) {
			const struct lz_region *region = lz_space_region(arena, &task->space, (uint32_t)near);
			uint64_t page = PAGES(task->near - region->start);

			found = lz_space_next_missing(arena, &task->space, (uint32_t)near, page, page + NEAR_PAGES,
						      budget - filled, &run);
		}
		if (!found) {
			task->near = 0;
			if (!next_to_fill(worker, task, budget - filled, &run, &number))
				return filled > 0 || task_filled(worker, task);
		}
		if (run.kind == LZ_KIND_DUMPED && !fetched_for_fill(worker, &run, !task->near))
			break;
		result = install_run(worker, task, &run, BY_FILL);
		if (!settle_outcome(worker, task, result) || !is_serving(task))
			break;
		filled += run.pages;
		if (near >= 0 && task->near)
			task->near = run.start + BYTES(run.pages);
	}
	__atomic_add_fetch(&engine->fill_spent, BYTES(filled), __ATOMIC_RELAXED);
	count(&worker->counters->fill_ns, lz_now_ns() - now);
	return filled > 0;
}

/* With fill off: the block around a fault, and no more. */
static void fill_around(struct lz_worker *worker, struct lz_task *task)
{
	struct lz_arena *arena = worker->engine->arena;
	uint64_t most = worker->engine->config.fault_around_pages;
	int64_t number = lz_space_find(arena, &task->space, task->near);
	struct lz_run run;

	if (number >= 0 && most > 1) {
		const struct lz_region *region = lz_space_region(arena, &task->space, (uint32_t)number);
		uint64_t page = PAGES(task->near - region->start), end = page + most;

		for (uint32_t copies = 0; copies < 4; copies++) {
			if (!lz_space_next_missing(arena, &task->space, (uint32_t)number, page, end, most, &run))
				break;
			if (!settle_outcome(worker, task, install_run(worker, task, &run, BY_FAULT)) ||
			    !is_serving(task))
				return;
			page = run.page + run.pages;
		}
	}
	task->near = 0;
}

/* One round of background work. True when something was done and the next round may do more. */
static bool fill(struct lz_worker *worker, uint64_t now)
{
	struct lz_engine *engine = worker->engine;
	bool full = __atomic_load_n(&engine->fill, __ATOMIC_ACQUIRE) == LZ_FILL_FULL;

	if (!__atomic_load_n(&engine->finished, __ATOMIC_ACQUIRE))
		return false;
	for (uint32_t tried = 0; tried < worker->tasks; tried++) {
		struct lz_task *task = worker->task[(worker->turn + tried) % worker->tasks];

		if (now < task->unsettled_ns)
			continue;
		if (task->events)
			continue;
		if (!task->handed_back)
			hand_back_empty(worker, task);
		if (!full) {
			if (task->near)
				fill_around(worker, task);
			continue;
		}
		if (fill_task(worker, task, now)) {
			worker->turn = worker->tasks ? (worker->turn + tried + 1) % worker->tasks : 0;
			return true;
		}
	}
	return false;
}

/* Ask the idle tasks whether they still exist; with fill off also whether they have all they need. */
static void probe_tasks(struct lz_worker *worker, uint64_t now)
{
	uint64_t interval = PROBE_NS * (1 + worker->tasks / 64);
	bool finished = __atomic_load_n(&worker->engine->finished, __ATOMIC_ACQUIRE);

	for (uint32_t i = worker->tasks; i-- > 0;) {
		struct lz_task *task = worker->task[i];
		struct lz_run run;
		uint32_t number;

		if (now < task->probe_ns)
			continue;
		task->probe_ns = now + interval;
		if (task->events)
			continue;
		if (lz_uffd_settled(task->uffd) == -ESRCH)
			task_gone(worker, task);
		else if (finished && !next_to_fill(worker, task, 1, &run, &number))
			task_filled(worker, task);
	}
}

/* Waiting */

static void take_inbox(struct lz_worker *worker)
{
	pthread_mutex_lock(&worker->inbox_lock);
	for (uint32_t i = 0; i < worker->inbox_count; i++) {
		struct lz_task *task = worker->inbox[i];
		int result = adopt(worker, task);

		if (result < 0)
			fail_task(worker, task, result);
		else
			serve(worker, task);
	}
	__atomic_store_n(&worker->inbox_count, 0, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&worker->inbox_lock);
}

/* How long nothing can be due. */
static uint64_t idle_ns(struct lz_worker *worker, uint64_t now)
{
	uint64_t rate = __atomic_load_n(&worker->engine->fill_rate, __ATOMIC_RELAXED);
	uint64_t until = now + 1000000000ULL;

	for (uint32_t i = 0; i < worker->tasks; i++) {
		const struct lz_task *task = worker->task[i];
		uint64_t due = task->unsettled_ns > now ? task->unsettled_ns : task->probe_ns;

		if (due < until)
			until = due;
	}
	if (rate && worker->tasks && until > now + 1000000)
		until = now + 1000000;
	return until > now ? until - now : 0;
}

static void wait_for_work(struct lz_worker *worker, uint64_t ns)
{
	struct epoll_event event[64];
	struct timespec timeout = { .tv_sec = (time_t)(ns / 1000000000ULL), .tv_nsec = (long)(ns % 1000000000ULL) };
	int ready;

	if (!ns && worker->tasks == 1) { /* saves the fault a system call */
		serve(worker, worker->task[0]);
		return;
	}
	ready = epoll_pwait2(worker->epoll, event, 64, &timeout, NULL);
	for (int i = 0; i < ready; i++) {
		struct lz_task *task = event[i].data.ptr;
		uint64_t token;

		if (!task) {
			ssize_t got = read(worker->wake, &token, sizeof(token));

			(void)got;
		} else if (is_serving(task)) {
			if (ns)
				task->empty_ns = lz_now_ns();
			serve(worker, task);
		}
	}
}

void *lz_worker_main(void *argument)
{
	struct lz_worker *worker = argument;
	struct lz_engine *engine = worker->engine;
	uint64_t busy_ns = 0;
	bool worked = false;

	while (!__atomic_load_n(&engine->stopping, __ATOMIC_ACQUIRE)) {
		uint64_t now, faults = worker->counters->faults;

		if (__atomic_load_n(&worker->inbox_count, __ATOMIC_ACQUIRE))
			take_inbox(worker);
		now = lz_now_ns();
		wait_for_work(worker, worked || now - busy_ns < SPIN_NS ? 0 : idle_ns(worker, now));
		now = lz_now_ns();
		if (worker->outstanding)
			serve_outstanding(worker, now);
		if (worker->pendings)
			retry_pending(worker, now);
		worked = fill(worker, now);
		if (worker->counters->faults != faults)
			busy_ns = now;
		if (!worked)
			probe_tasks(worker, now);
	}
	if (__atomic_load_n(&engine->abandoning, __ATOMIC_ACQUIRE)) {
		take_inbox(worker);
		while (worker->tasks) {
			struct lz_task *task = worker->task[0];

			if (lz_uffd_settled(task->uffd) == -ESRCH)
				task_gone(worker, task);
			else
				fail_task(worker, task, -ECANCELED);
		}
	}
	return NULL;
}
