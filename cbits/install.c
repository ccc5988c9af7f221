/* SPDX-License-Identifier: MIT */
/* Putting pages into a task: from a pages image, as zeros, or as poison. */
#define _GNU_SOURCE 1
#include "worker.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/*
 * How old the look before a copy may be. For a fault no older than the copy after it takes, in which nobody looks
 * either. The fill of a chain of images goes from one source to the next and back; whatever changes in between, the
 * look behind the copy sees, and stops the task.
 */
#define CHECKED_NS 10000U
#define FILL_CHECKED_NS 500000U

/* How many bytes of a pages image, from its start, are still what they were when it was loaded. */
static uint64_t source_bytes(struct lz_worker *worker, uint16_t number)
{
	struct lz_source *source = &worker->engine->source[number];
	struct stat status;
	uint64_t size;

	/* Not fstat(): that goes through newfstatat with an empty path, which costs three times as much. */
	if (syscall(SYS_fstat, source->fd, &status) < 0)
		return 0;
	size = (uint64_t)status.st_size;
	if (size == source->size && status.st_mtim.tv_sec == source->mtime_s &&
	    status.st_mtim.tv_nsec == source->mtime_ns)
		return size;
	if (!__atomic_exchange_n(&source->told, 1, __ATOMIC_RELAXED))
		lz_notify(worker,
			  (struct lz_notice){ .kind = LZ_NOTICE_SOURCE_CHANGED, .source = number, .value = size });
	/* Cut: what is left of it is as it was. As long as before, or longer: written again, by another dump. */
	return size < source->size ? size : 0;
}

bool lz_source_holds(struct lz_worker *worker, enum lz_for who, uint16_t number, uint64_t end)
{
	struct lz_source_view *view = &worker->view[who][number];

	if (worker->engine->source[number].is_landing)
		return true;
	view->checked_bytes = source_bytes(worker, number);
	view->checked_ns = lz_now_ns();
	return view->checked_bytes >= end;
}

bool lz_source_held(struct lz_worker *worker, enum lz_for who, enum lz_cause cause, uint16_t number, uint64_t end)
{
	const struct lz_source_view *view = &worker->view[who][number];
	const uint64_t most_ns = cause == LZ_BY_FILL ? FILL_CHECKED_NS : CHECKED_NS;

	if (view->checked_bytes >= end && lz_now_ns() - view->checked_ns < most_ns)
		return true;
	return lz_source_holds(worker, who, number, end);
}

/*
 * Ask how much of a range of a source, from its start, is in memory; 0 when its first page is not.
 */
uint64_t lz_resident_bytes(struct lz_worker *worker, enum lz_for who, uint16_t number, uint64_t start, uint64_t end)
{
	const struct lz_source *source = &worker->engine->source[number];
	struct lz_source_view *view = &worker->view[who][number];
	unsigned char there[RESIDENT_PAGES];
	uint64_t pages, known = 0;
	bool is_wide;

	if (source->is_landing)
		return lz_remote_arrived(&worker->engine->remote, start, end);
	if (view->start <= start && start < view->end)
		return (end < view->end ? end : view->end) - start;
	/*
	 * Small questions are those of faults: nothing says that what follows will be asked. But a chain of many images
	 * is filled in small runs, each from another source, and forward in each.
	 */
	is_wide = end - start > BYTES(ACTIVE_CHUNK_PAGES) || start == view->next;
	view->next = end;
	pages = is_wide ? RESIDENT_PAGES : PAGES(end - start);
	if (pages > PAGES(source->size - start + LZ_PAGE_SIZE - 1))
		pages = PAGES(source->size - start + LZ_PAGE_SIZE - 1);
	if (mincore((void *)(uintptr_t)(source->map + start), BYTES(pages), there) < 0)
		return end - start;
	while (known < pages && there[known] & 1)
		known++;
	if (is_wide && known) {
		view->start = start;
		view->end = start + BYTES(known);
	}
	return BYTES(known) < end - start ? BYTES(known) : end - start;
}

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

	if ((result == -EEXIST || (result == -ENOENT && pages == 1)) && !done) {
		mark_present(worker, task, start, 1);
		lz_forget_left(task, 1);
		lz_uffd_wake(task->uffd, start, LZ_PAGE_SIZE);
		return 1;
	}
	if (result == -EINVAL || result == -ENOTTY) {
		/* A kernel that cannot poison: the page stays missing and its faults blocked. */
		notice.kind = LZ_NOTICE_HELD;
		lz_space_mark(worker->engine->arena, &task->space, start, pages, LZ_ASKED);
		task->held_pages += pages;
		lz_forget_left(task, pages);
		done = BYTES(pages);
	} else if (result == -ENOENT) {
		return give_up_pages(worker, task, start, pages / 2, source, error);
	} else if (!done) {
		return result;
	} else {
		mark_present(worker, task, start, PAGES(done));
		lz_count(&worker->counters->poisoned_pages, PAGES(done));
		lz_forget_left(task, PAGES(done));
	}
	notice.value = PAGES(done);
	lz_notify(worker, notice);
	return (int64_t)PAGES(done);
}

/* What is installed of a page server's pages is of no use any more, unless a fork of the task may want it. */
static void release_landed(struct lz_worker *worker, const struct lz_task *task, const struct lz_source *source,
			   uint64_t offset, uint64_t bytes)
{
	if (source->is_landing && lz_space_is_alone(worker->engine->arena, &task->space))
		lz_remote_release(&worker->engine->remote, offset, offset + bytes);
}

/*
 * Install a run of missing dumped pages. 0 when every page of it is dealt with; -EAGAIN or -ENOMEM to try again later,
 * -ESRCH when the memory is gone, other errors when this task cannot be served.
 */
int lz_install_run(struct lz_worker *worker, struct lz_task *task, const struct lz_run *run, enum lz_cause cause)
{
	struct lz_source *source = &worker->engine->source[run->source];
	struct lz_counters *counters = worker->counters;
	uint64_t start = run->start, offset = run->offset, left = run->pages, most = run->pages;
	uint64_t readable = run->pages;

	if (run->kind == LZ_KIND_REMOTE && !source->is_landing)
		return give_up_pages(worker, task, start, left, run->source, -EOPNOTSUPP) < 0 ? -EAGAIN : 0;
	if (!lz_source_held(worker, LZ_FOR_WORKER, cause, run->source, offset + BYTES(left))) {
		uint64_t size = source_bytes(worker, run->source);

		readable = size > offset ? PAGES(size - offset) : 0;
		if (readable > left)
			readable = left;
	}
	while (left) {
		uint64_t pages = left < most ? left : most, done;
		const uint8_t *bytes = source->map + offset;
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
		if (source->is_landing) {
			uint64_t good = lz_remote_good(&worker->engine->remote, offset, pages);
			int64_t given = good ? 0 : give_up_pages(worker, task, start, 1, run->source, -ENODATA);

			if (given < 0)
				return (int)given;
			if (!good) {
				start += LZ_PAGE_SIZE;
				offset += LZ_PAGE_SIZE;
				left--;
				readable--;
				continue;
			}
			pages = good;
			bytes = lz_remote_bytes(&worker->engine->remote, offset, &pages);
		}
		LZ_POINT("before-copy", start);
		result = lz_uffd_copy(task->uffd, start, bytes, BYTES(pages), &done);
		if (done) {
			LZ_POINT("after-copy", start);
			lz_task_settle(task);
			mark_present(worker, task, start, PAGES(done));
			lz_forget_left(task, PAGES(done));
			lz_count(cause == LZ_BY_FAULT ? &counters->fault_copied_pages : &counters->fill_copied_pages,
				 PAGES(done));
			release_landed(worker, task, source, offset, done);
			if (!lz_source_holds(worker, LZ_FOR_WORKER, run->source, offset + done))
				lz_notify(worker, (struct lz_notice){ .kind = LZ_NOTICE_SUSPECT,
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
			lz_task_settle(task);
			mark_present(worker, task, start, 1);
			lz_forget_left(task, 1);
			release_landed(worker, task, source, offset, LZ_PAGE_SIZE);
			lz_count(&counters->present_pages, 1);
			lz_uffd_wake(task->uffd, start, LZ_PAGE_SIZE);
			break;
		case -ENOENT:
			if (pages > 1) { /* the range crosses the end of a VMA: an mprotect has split it */
				most = pages / 2;
				continue;
			}
			/* Not registered with us: whoever touches it does not wait for us. */
			lz_task_settle(task);
			mark_present(worker, task, start, 1);
			lz_forget_left(task, 1);
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

int lz_install_zeros(struct lz_worker *worker, struct lz_task *task, uint64_t start, uint64_t pages, bool to_write)
{
	const void *zeros = to_write ? worker->zeros : NULL;

	if (zeros && pages > LZ_FRESH_PAGES)
		pages = LZ_FRESH_PAGES;
	for (;;) {
		uint64_t done;
		int result;

		LZ_POINT("before-zero", start);
		result = zeros ? lz_uffd_copy(task->uffd, start, zeros, BYTES(pages), &done) :
				 lz_uffd_zero(task->uffd, start, BYTES(pages), &done);
		if (done) {
			lz_task_settle(task);
			mark_present(worker, task, start, PAGES(done));
			lz_count(&worker->counters->zero_pages, PAGES(done));
			return 0;
		}
		if (result == -EEXIST) {
			lz_task_settle(task);
			mark_present(worker, task, start, 1);
			lz_count(&worker->counters->present_pages, 1);
			lz_uffd_wake(task->uffd, start, LZ_PAGE_SIZE);
			return 0;
		}
		if ((result == -ENOENT || result == -ENOMEM) && pages > 1) {
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
