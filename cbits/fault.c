/* SPDX-License-Identifier: MIT */
/* Answering faults: what a page is, how much beside it comes with it, and what waits. */
#define _GNU_SOURCE 1
#include "worker.h"

#include <errno.h>

#define ZERO_WINDOW_PAGES 512U
#define COPY_WINDOW_PAGES 192U
#define STREAM_REACH_PAGES 256U /* the fill goes on ahead of a stream, so its next fault is that much later */
#define SHARED_PAGES 64U        /* a window from which on the helper is let go meanwhile */
#define NEIGHBOUR_PAGES 32U     /* a fault that close to the one before shows that neighbours are worth bringing */

/* Find the forward stream that a fault belongs to, or begin one in the place of the oldest. */
static struct lz_stream *stream_of(struct lz_task *task, uint64_t address)
{
	const uint64_t reach = BYTES(task->scatter < SCATTER_RANDOM ? STREAM_REACH_PAGES : NEIGHBOUR_PAGES / 2);
	struct lz_stream *oldest = &task->stream[0];

	task->stream_clock++;
	for (uint32_t i = 0; i < LZ_STREAMS; i++) {
		struct lz_stream *stream = &task->stream[i];

		if (address >= stream->next && address < stream->next + reach && stream->next) {
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

/* Learn from where a fault is whether faults come near each other. */
static void note_scatter(struct lz_task *task, const struct lz_stream *stream, uint64_t address)
{
	uint64_t distance = address > task->last_fault ? address - task->last_fault : task->last_fault - address;

	if (stream->streak || distance <= BYTES(NEIGHBOUR_PAGES))
		task->scatter = task->scatter > 4 ? task->scatter - 4 : 0;
	else if (task->scatter < SCATTER_MOST)
		task->scatter++;
	task->last_fault = address;
}

static bool fill_is_off(struct lz_worker *worker)
{
	return __atomic_load_n(&worker->engine->shared->fill, __ATOMIC_RELAXED) == LZ_FILL_OFF;
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
 * Install the window of a fault, its page first. A large one, far into a stream, is worth the helper's time too: the
 * helper copies until the task is woken, which is by its page, last.
 */
static int install_window(struct lz_worker *worker, struct lz_task *task, const struct lz_run *run)
{
	struct lz_run first = *run, rest = *run;
	uint32_t depth;
	int result;

	if (!task->jobs || run->pages < SHARED_PAGES)
		return lz_install_run(worker, task, run, LZ_BY_FAULT);
	first.pages = 1;
	rest.pages--;
	rest.page++;
	rest.start += LZ_PAGE_SIZE;
	rest.offset += LZ_PAGE_SIZE;
	depth = lz_helper_lend(worker);
	result = lz_install_run(worker, task, &rest, LZ_BY_FAULT);
	lz_helper_regain(worker, depth);
	lz_helper_stand_by(worker);
	if (result || !lz_is_serving(task))
		return result;
	return lz_install_run(worker, task, &first, LZ_BY_FAULT);
}

/*
 * Ask the page server for the window of a fault; where faults come near each other, for the block that it is in, too:
 * it would be wanted before long, and the way is far.
 */
static void ask_for_fault(struct lz_worker *worker, struct lz_task *task, const struct lz_region *region,
			  const struct lz_run *run)
{
	struct lz_remote *remote = &worker->engine->remote;
	struct lz_arena *arena = worker->engine->arena;
	uint64_t page = run->page & ~(uint64_t)(ACTIVE_CHUNK_PAGES - 1), end = page + ACTIVE_CHUNK_PAGES;
	int64_t number = lz_space_find(arena, &task->space, run->start);
	struct lz_run around;

	(void)lz_remote_ask(remote, worker, task->image_pid, region->image_start + BYTES(run->page), run->offset,
			    (uint32_t)run->pages, true);
	while (task->scatter < SCATTER_RANDOM && number >= 0 &&
	       lz_space_next_missing(arena, &task->space, (uint32_t)number, page, end, ACTIVE_CHUNK_PAGES, &around)) {
		page = around.page + around.pages;
		if (around.kind == LZ_KIND_REMOTE)
			(void)lz_remote_ask(remote, worker, task->image_pid, region->image_start + BYTES(around.page),
					    around.offset, (uint32_t)around.pages, true);
	}
}

/*
 * Answer one fault. 0: the thread will go on (or fault again); -EINPROGRESS: its page is on its way, and *read says by
 * which read, or that it comes from the page server; else as install_run. *read on the way in is the read that was
 * waited for, or LZ_NO_READ.
 */
static int answer(struct lz_worker *worker, struct lz_task *task, struct lz_fault fault, uint32_t *read)
{
	const uint64_t address = fault.address;
	struct lz_arena *arena = worker->engine->arena;
	struct lz_space *space = &task->space;
	const int64_t number = lz_space_find(arena, space, address);
	const uint64_t zero_most = fault.to_write ? LZ_FRESH_PAGES : ZERO_WINDOW_PAGES;
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
		pages = window_of(stream, zero_most);
		if (pages > PAGES(end - address))
			pages = PAGES(end - address);
		result = lz_install_zeros(worker, task, address, pages, fault.to_write);
		stream->next = address + BYTES(pages);
		return result;
	}

	region = lz_space_region(arena, space, (uint32_t)number);
	page = PAGES(address - region->start);
	image_address = region->image_start + (address - region->start);
	state = lz_space_state(arena, space, address);
	if (state == LZ_PRESENT) {
		/* Another thread's fault brought it between this fault and its message; ZEROPAGE says -EEXIST then and
		 * wakes. Or it is not there, in memory that a fork has wiped: zeros are what it holds. */
		return lz_install_zeros(worker, task, address, 1, false);
	}
	if (state == LZ_ASKED && !task->jobs)
		return 0; /* held back: nothing can be given */

	stream = stream_of(task, address);
	note_scatter(task, stream, address);
	extent = lz_space_extent(arena, space, image_address, &gap_end);
	if (state == LZ_REMOVED || !extent || extent->kind == LZ_KIND_ZERO) {
		if (state == LZ_REMOVED) {
			uint64_t most = window_of(stream, zero_most);

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
			if (pages > window_of(stream, zero_most))
				pages = window_of(stream, zero_most);
			pages = lz_space_state_run(arena, space, region, page, pages, true);
		}
		stream->next = address + BYTES(pages);
		return lz_install_zeros(worker, task, address, pages, fault.to_write);
	}

	struct lz_run run;

	pages = window_of(stream, COPY_WINDOW_PAGES);
	if (state == LZ_ASKED) {
		/* The helper has it, and may be a while: the same bytes from here, as far as it has them. */
		uint64_t most = PAGES(extent->start + BYTES(extent->pages) - image_address);

		if (extent->kind != LZ_KIND_DUMPED)
			return 0;
		run = (struct lz_run){
			.start = address,
			.pages = 1,
			.offset = extent->offset + (image_address - extent->start),
			.source = extent->source,
			.kind = LZ_KIND_DUMPED,
		};
		while (run.pages < pages && run.pages < LZ_JOB_PAGES / 4 && run.pages < most &&
		       page + run.pages < region->pages &&
		       lz_space_state(arena, space, address + BYTES(run.pages)) == LZ_ASKED)
			run.pages++;
		stream->next = address + BYTES(run.pages);
		return lz_install_run(worker, task, &run, LZ_BY_FAULT);
	}
	if (!lz_space_next_missing(arena, space, (uint32_t)number, page, page + 1, 1, &run))
		return -EUCLEAN; /* the state said missing and the table has it */
	if (pages > 1 && lz_space_next_missing(arena, space, (uint32_t)number, page, page + pages, pages, &run))
		pages = run.pages;
	if (run.kind == LZ_KIND_DUMPED || worker->engine->source[run.source].is_landing) {
		uint64_t there =
			lz_resident_bytes(worker, LZ_FOR_WORKER, run.source, run.offset, run.offset + BYTES(run.pages));

		if (!there && run.kind == LZ_KIND_REMOTE) {
			ask_for_fault(worker, task, region, &run);
			*read = LZ_REMOTE_READ + (uint32_t)PAGES(run.offset);
			return -EINPROGRESS;
		}
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
	result = install_window(worker, task, &run);
	if (!lz_is_serving(task))
		return result;
	/*
	 * What is around it goes next: the block it is in, or, in a stream, what follows. Faults all over the place
	 * show that neither is of use: then the fill goes on in order, whose copies are large and whose source is read
	 * forward, and that ends the faults soonest.
	 */
	task->in_stream = stream->streak > 0;
	if (stream->streak)
		task->near = stream->next;
	else if (task->scatter < SCATTER_RANDOM || fill_is_off(worker))
		task->near = address & ~(BYTES(16) - 1);
	else
		task->near = 0;
	if (task->near && task->near < region->start)
		task->near = region->start;
	return result;
}

/* Put a fault aside that cannot be answered yet. */
static void hold_fault(struct lz_worker *worker, struct lz_task *task, struct lz_fault fault, uint64_t since,
		       uint32_t read)
{
	/* One that a read was begun for must be kept: its slot is freed by what is kept. */
	const bool must = read < LZ_READS;

	for (uint32_t i = 0; i < worker->pendings && !must; i++) {
		if (worker->pending[i].task == task && worker->pending[i].fault.address == fault.address)
			return;
	}
	if (worker->pendings >= LZ_PENDING && !must) {
		lz_uffd_wake(task->uffd, fault.address, LZ_PAGE_SIZE); /* it will ask again */
		return;
	}
	worker->pending[worker->pendings++] =
		(struct lz_pending){ .task = task, .fault = fault, .since_ns = since, .read = read };
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
	lz_count(&counters->fault_ns[bucket], 1);
	lz_count(&counters->fault_ns_sum, ns);
	if (ns > counters->fault_ns_max)
		__atomic_store_n(&counters->fault_ns_max, ns, __ATOMIC_RELAXED);
}
void lz_fault_answer(struct lz_worker *worker, struct lz_task *task, struct lz_fault fault, uint64_t since,
		     uint32_t read)
{
	const bool was_read = read < LZ_READS;
	int result;

	if (!lz_is_serving(task))
		return;
	if (task->batch.events) {
		hold_fault(worker, task, fault, since, LZ_NO_READ); /* nothing can be installed now */
		return;
	}
	/* An answer lets the task go on, perhaps where the helper is: in the middle of a copy it would be held up. */
	lz_helper_hold(worker);
	lz_helper_stand_by(worker);
	result = answer(worker, task, fault, &read);
	lz_helper_release(worker);
	if (!lz_task_outcome(worker, task, result)) {
		hold_fault(worker, task, fault, since, was_read && read < LZ_READS ? LZ_NO_READ : read);
		return;
	}
	if (lz_is_serving(task)) {
		uint64_t now = lz_now_ns();

		task->fault_ns = now;
		record_latency(worker->counters, now - since);
	}
}

/* Whether what a fault waits for is done, as far as one can tell. */
static bool has_come(struct lz_worker *worker, uint32_t read)
{
	if (read == LZ_NO_READ)
		return true;
	if (read >= LZ_REMOTE_READ)
		return lz_remote_is_due(&worker->engine->remote, BYTES(read - LZ_REMOTE_READ));
	return lz_io_take(&worker->engine->io, read);
}

void lz_fault_retry(struct lz_worker *worker, uint64_t now)
{
	uint32_t due = worker->pendings;

	for (uint32_t i = 0; i < due && i < worker->pendings;) {
		struct lz_pending pending = worker->pending[i];

		if (now < pending.task->unsettled_ns || !has_come(worker, pending.read)) {
			i++;
			continue;
		}
		if (pending.read != LZ_NO_READ && pending.read >= LZ_REMOTE_READ)
			pending.read = LZ_NO_READ;
		worker->pending[i] = worker->pending[--worker->pendings];
		if (due > worker->pendings)
			due = worker->pendings;
		lz_fault_answer(worker, pending.task, pending.fault, pending.since_ns, pending.read);
	}
}
