/* SPDX-License-Identifier: MIT */
/* Background work: handing VMAs back to the kernel, and filling what nobody has asked for yet. */
#define _GNU_SOURCE 1
#include "worker.h"

#include <errno.h>
#include <sys/mman.h>

#define ACTIVE_NS 1000000U /* a task that faulted within this time gets small chunks of fill */
#define ACTIVE_FILL_PAGES 12U
#define IDLE_CHUNK_PAGES 64U
#define HAND_BACK_REGIONS 8U    /* looked at in one round */
#define SETTLED_IN_NS 10000000U /* a task has to run this long, */
#define QUIET_NS 2000000U       /* and to leave its layout alone this long, before anything is handed back */
#define HELP_PAGES 256U         /* less than this is not worth a helper */
#define CHUNK_COPIES 16U        /* copies in one chunk, however small */
#define NEAR_PAGES 2048U        /* how far behind a fault the fill looks before it goes on elsewhere */
#define RATE_BURST_BYTES (1U << 20)
#define ASK_AHEAD_BYTES (32ULL << 20) /* the fill wants no more than this before it can install it */
#define REMOTE_ACTIVE_NS 20000000U    /* faults that wait for a page server are further apart */
#define AHEAD_BYTES (4ULL << 20)      /* read in one request, and this far before the fill needs it */

/* Whether a task has faulted within a time; it may have been answered since the clock was looked at. */
static bool has_faulted(const struct lz_task *task, uint64_t now, uint64_t within_ns)
{
	return now < task->fault_ns || now - task->fault_ns < within_ns;
}

/* Whether a task has left its layout alone for a while, since it runs. */
static bool is_quiet(const struct lz_worker *worker, const struct lz_task *task, uint64_t now)
{
	const uint64_t start_ns = worker->engine->shared->fill_start_ns;

	return now >= task->event_ns + QUIET_NS && now >= start_ns + SETTLED_IN_NS;
}

static void ask_anew(struct lz_task *task)
{
	task->ask_region = 0;
	task->ask_page = 0;
	task->ask_lead = 0; /* what is asked already will be counted again */
}

void lz_fill_anew(struct lz_task *task)
{
	task->fill_region = 0;
	ask_anew(task);
}

/*
 * Give a done block back to the kernel. The head of worker.c says why in this order. A VMA that grows in the middle of
 * it, which no event tells, is cut where it ended, and an mremap of the whole of it fails until the two halves are one
 * again. So it is done while the task leaves its layout alone, it is looked at for that afterwards, and what a change
 * has got between is tried once more later.
 */
static void hand_back(struct lz_worker *worker, struct lz_task *task, uint32_t number)
{
	struct lz_arena *arena = worker->engine->arena;
	const struct lz_region *region;
	uint32_t first, regions;
	uint64_t start, end;
	bool done, followed;

	if (task->held_pages || !lz_space_done_block(arena, &task->space, number, &first, &regions) ||
	    regions == task->space.regions)
		return;
	start = lz_space_region(arena, &task->space, first)->start;
	region = lz_space_region(arena, &task->space, first + regions - 1);
	end = region->start + BYTES(region->pages);
	if (!is_quiet(worker, task, lz_now_ns()) || lz_uffd_settled(task->uffd) < 0) {
		task->handed_back = task->space.regions + 1;
		return;
	}
	/* A VMA that reaches past what we know would be split. */
	followed = lz_uffd_probe(task->uffd, end, LZ_PAGE_SIZE) == -EFAULT;
	if (lz_uffd_probe(task->uffd, start - LZ_PAGE_SIZE, 2 * LZ_PAGE_SIZE) == -EFAULT ||
	    (followed && lz_uffd_probe(task->uffd, end - LZ_PAGE_SIZE, 2 * LZ_PAGE_SIZE) == -EFAULT))
		return;
	LZ_POINT("before-unregister", start);
	worker->flight->handing_start = start;
	worker->flight->handing_end = end;
	__atomic_store_n(&worker->flight->handing_task, task->number + 1, __ATOMIC_RELEASE);
	done = !lz_uffd_unregister(task->uffd, start, end - start);
	LZ_POINT("after-unregister", start);
	if (done && (lz_uffd_settled(task->uffd) < 0 ||
		     (!followed && lz_uffd_probe(task->uffd, end, LZ_PAGE_SIZE) == -EFAULT))) {
		(void)lz_uffd_register(task->uffd, start, end - start);
		task->handed_back = task->space.regions + 1;
		done = false;
	}
	__atomic_store_n(&worker->flight->handing_task, 0, __ATOMIC_RELEASE);
	if (!done)
		return;
	lz_count(&worker->counters->unregistered_pages, PAGES(end - start));
	if (!lz_events_begin_change(worker, task))
		(void)lz_space_unmap(arena, &task->space, start, end); /* ends at region ends: nothing is cut */
	lz_events_end_change(task, 0);
	lz_fill_anew(task);
}

/*
 * Advance over what is installed already; returns true and the next missing run of the base fill, or false when no
 * image page of the task is missing.
 */
bool lz_fill_next(struct lz_worker *worker, struct lz_task *task, uint64_t most, struct lz_run *run, uint32_t *number)
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
		if (task->jobs)
			continue; /* what the helper has may come back */
		region->fill_page = region->pages;
		region->flags |= LZ_REGION_DONE;
		if (__atomic_load_n(&worker->engine->shared->finished, __ATOMIC_ACQUIRE)) {
			uint32_t regions = task->space.regions;

			hand_back(worker, task, i);
			if (task->space.regions != regions)
				i = UINT32_MAX; /* the numbers have changed: once more from the first */
		}
	}
	return false;
}

void lz_fill_again(struct lz_worker *worker, struct lz_task *task, uint64_t address)
{
	struct lz_arena *arena = worker->engine->arena;
	int64_t number = lz_space_find(arena, &task->space, address);

	if (number >= 0) {
		struct lz_region *region = LZ_AT(arena, struct lz_region, task->space.regions_offset) + number;
		uint64_t page = PAGES(address - region->start);

		if (page < region->fill_page)
			region->fill_page = page;
		region->flags &= ~(uint32_t)LZ_REGION_DONE;
		task->fill_region = 0;
	}
}

/* The first look after the restore is finished: VMAs without image bytes go back at once. */
static void hand_back_empty(struct lz_worker *worker, struct lz_task *task)
{
	struct lz_arena *arena = worker->engine->arena;
	struct lz_run run;

	const bool is_first = !task->handed_back;

	if (is_first)
		lz_helper_recall(worker, task); /* what it has is still missing */
	for (uint32_t i = 0; is_first && i < task->space.regions; i++) {
		struct lz_region *region = LZ_AT(arena, struct lz_region, task->space.regions_offset) + i;

		if (!lz_space_next_missing(arena, &task->space, i, region->fill_page, region->pages, 1, &run))
			region->flags |= LZ_REGION_DONE;
	}
	if (is_first)
		task->handed_back = task->space.regions + 1;
	/* A few at a time: a fault may be waiting. */
	for (uint32_t n = 0; n < HAND_BACK_REGIONS && task->handed_back > 1; n++) {
		uint32_t number = --task->handed_back - 1;

		if (number < task->space.regions)
			hand_back(worker, task, number);
		if (task->handed_back > number + 1)
			break; /* its layout is changing */
	}
}

/* Whether a page is missing, whatever the fill has come to believe; then the fill goes on there. */
static bool is_one_missing(struct lz_worker *worker, struct lz_task *task)
{
	struct lz_arena *arena = worker->engine->arena;
	struct lz_run run;

	for (uint32_t i = 0; i < task->space.regions; i++) {
		uint64_t pages = lz_space_region(arena, &task->space, i)->pages;

		if (lz_space_next_missing(arena, &task->space, i, 0, pages, 1, &run)) {
			lz_fill_again(worker, task, run.start);
			return true;
		}
	}
	return false;
}

/*
 * Nothing is missing any more: close the uffd, unless a page is held back whose faults must stay blocked. What is
 * missing then reads as zeros for ever, so if the count says that something is left, this one looks for itself.
 */
bool lz_fill_done(struct lz_worker *worker, struct lz_task *task)
{
	if (task->held_pages || task->jobs || (task->left_pages && is_one_missing(worker, task)))
		return false;
	lz_task_end(worker, task, LZ_TASK_FILLED, (struct lz_notice){ .kind = LZ_NOTICE_TASK_FILLED });
	return true;
}

/* How many bytes of background fill the rate allows now; UINT64_MAX without a limit. */
static uint64_t fill_allowance(struct lz_engine *engine, uint64_t now)
{
	uint64_t rate = __atomic_load_n(&engine->shared->fill_rate, __ATOMIC_RELAXED), earned, spent, since;

	if (!rate)
		return UINT64_MAX;
	/* The controlling thread may have set the start after this thread looked at the clock. */
	since = now > engine->shared->fill_start_ns ? now - engine->shared->fill_start_ns : 0;
	earned = (uint64_t)((double)since * 1e-9 * (double)rate) + RATE_BURST_BYTES / 16;
	spent = __atomic_load_n(&engine->shared->fill_spent, __ATOMIC_RELAXED);
	if (earned > spent + RATE_BURST_BYTES) {
		/* What an idle time earned is not saved up. */
		__atomic_compare_exchange_n(&engine->shared->fill_spent, &spent, earned - RATE_BURST_BYTES, false,
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
	struct lz_source_view *view = &worker->view[LZ_FOR_WORKER][run->source];
	const uint64_t known = view->end;
	uint64_t end = run->offset + BYTES(run->pages);
	uint64_t ahead = run->offset + AHEAD_BYTES, there;

	/* A fill in order asks for a window at a time, one that follows random faults for no more than it needs. */
	if (in_order && end < run->offset + BYTES(RESIDENT_PAGES))
		end = run->offset + BYTES(RESIDENT_PAGES) < size ? run->offset + BYTES(RESIDENT_PAGES) : size;
	there = lz_resident_bytes(worker, LZ_FOR_WORKER, run->source, run->offset, end);
	if (!there && view->asked != run->offset + 1) {
		view->asked = run->offset + 1;
		lz_io_ahead(io, worker, run->source, run->offset, ahead < size ? ahead : size);
		return false;
	}
	if (!there) {
		/* It was read, or is being read, and is not there: past the end of a file that was cut, or on a bad
		 * block. The copy of one page waits for it, or tells. */
		if (lz_io_is_reading(io, run->source, run->offset))
			return false;
		run->pages = 1;
		view->asked = 0;
		return true;
	}
	if (view->end != known && ahead < size) { /* once a window */
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

/* The run address in the middle of a task's regions. */
static uint64_t middle_of(struct lz_worker *worker, const struct lz_task *task)
{
	struct lz_arena *arena = worker->engine->arena;
	uint64_t pages = 0, half;

	for (uint32_t i = 0; i < task->space.regions; i++)
		pages += lz_space_region(arena, &task->space, i)->pages;
	half = pages / 2;
	for (uint32_t i = 0; i < task->space.regions; i++) {
		const struct lz_region *region = lz_space_region(arena, &task->space, i);

		if (half < region->pages)
			return region->start + BYTES(half);
		half -= region->pages;
	}
	return 0;
}

/*
 * The next run for the helper: from the middle to the end, far from where the worker fills and where a program that
 * reads forward is likely to be, and then what is left.
 */
static bool next_to_help(struct lz_worker *worker, struct lz_task *task, struct lz_run *run)
{
	struct lz_arena *arena = worker->engine->arena;
	uint32_t number;

	if (!task->help_at && !task->help_done)
		task->help_at = middle_of(worker, task);
	while (!task->help_done) {
		const struct lz_region *region;
		uint64_t page;

		number = lz_space_first_after(arena, &task->space, task->help_at);
		region = lz_space_region(arena, &task->space, number);
		if (!region) {
			task->help_done = 1;
			break;
		}
		page = task->help_at > region->start ? PAGES(task->help_at - region->start) : 0;
		if (lz_space_next_missing(arena, &task->space, number, page, region->pages, LZ_JOB_PAGES, run)) {
			task->help_at = run->start + BYTES(run->pages);
			return true;
		}
		task->help_at = region->start + BYTES(region->pages);
	}
	return lz_fill_next(worker, task, LZ_JOB_PAGES, run, &number);
}

/* Ask the page server for the remote pages of a run; returns how many pages of it are dealt with, all if it is local.
 */
static uint64_t ask_run(struct lz_worker *worker, struct lz_task *task, const struct lz_region *region,
			const struct lz_run *run)
{
	if (run->kind != LZ_KIND_REMOTE)
		return run->pages;
	return lz_remote_ask(&worker->engine->remote, worker, task->image_pid, region->image_start + BYTES(run->page),
			     run->offset, (uint32_t)run->pages, false);
}

/* Ask for what the last fault shows to be wanted next. */
static void ask_near(struct lz_worker *worker, struct lz_task *task, bool is_active)
{
	struct lz_remote *remote = &worker->engine->remote;
	struct lz_arena *arena = worker->engine->arena;
	const uint64_t chunk = lz_remote_chunk(remote, is_active);
	int64_t near = task->near ? lz_space_find(arena, &task->space, task->near) : -1;
	const struct lz_region *region;
	uint64_t page, end;
	struct lz_run run;

	if (near < 0)
		return;
	region = lz_space_region(arena, &task->space, (uint32_t)near);
	page = PAGES(task->near - region->start);
	end = page + NEAR_PAGES;
	while (lz_remote_room(remote, is_active) >= LZ_PAGE_SIZE &&
	       lz_space_next_missing(arena, &task->space, (uint32_t)near, page, end, chunk, &run)) {
		uint64_t dealt = ask_run(worker, task, region, &run);

		if (!dealt)
			return;
		page = run.page + dealt;
	}
}

/* Keep the link to the page server busy with what the fill will want, in its order. */
static void ask_for_fill(struct lz_worker *worker, struct lz_task *task, bool is_active)
{
	struct lz_remote *remote = &worker->engine->remote;
	struct lz_arena *arena = worker->engine->arena;
	const uint32_t generation = __atomic_load_n(&remote->link->generation, __ATOMIC_ACQUIRE);
	const uint64_t most = lz_remote_chunk(remote, is_active);
	uint64_t first = UINT64_MAX;
	struct lz_run run;
	uint32_t number;

	ask_near(worker, task, is_active);
	if (lz_fill_next(worker, task, 1, &run, &number) && run.kind == LZ_KIND_REMOTE)
		first = run.offset;
	if (task->ask_generation != generation || (first != UINT64_MAX && !lz_remote_is_asked(remote, first))) {
		task->ask_generation = generation;
		ask_anew(task);
	}
	while (task->ask_region < task->space.regions && lz_remote_room(remote, is_active) >= LZ_PAGE_SIZE) {
		const struct lz_region *region = lz_space_region(arena, &task->space, task->ask_region);
		uint64_t page = task->ask_page > region->fill_page ? task->ask_page : region->fill_page, dealt;
		bool is_remote;

		if (region->flags & LZ_REGION_DONE ||
		    !lz_space_next_missing(arena, &task->space, task->ask_region, page, region->pages, most, &run)) {
			task->ask_region++;
			task->ask_page = 0;
			continue;
		}
		is_remote = run.kind == LZ_KIND_REMOTE;
		/* While the fill copies local pages, nothing of what has come is used up: then all that is asked
		 * counts. */
		if (is_remote && first != UINT64_MAX)
			task->ask_lead = run.offset > first ? run.offset - first : 0;
		if (is_remote && task->ask_lead > ASK_AHEAD_BYTES)
			return;
		dealt = ask_run(worker, task, region, &run);
		if (!dealt)
			return;
		task->ask_page = run.page + dealt;
		if (is_remote)
			task->ask_lead += BYTES(dealt);
	}
}

/* How much of a run can be installed now; 0: none of it has come. */
static uint64_t arrived_pages(struct lz_worker *worker, const struct lz_run *run)
{
	if (run->kind != LZ_KIND_REMOTE || !worker->engine->source[run->source].is_landing)
		return run->pages;
	return PAGES(lz_remote_arrived(&worker->engine->remote, run->offset, run->offset + BYTES(run->pages)));
}

/* Keep the helper in work. */
static void give_to_helper(struct lz_worker *worker, struct lz_task *task, uint32_t copy_pages, uint64_t now)
{
	lz_helper_harvest(worker);
	while (lz_helper_has_room(worker, now)) {
		struct lz_run run;

		if (!next_to_help(worker, task, &run) || run.kind != LZ_KIND_DUMPED ||
		    lz_resident_bytes(worker, LZ_FOR_HELPER, run.source, run.offset, run.offset + BYTES(run.pages)) <
			    BYTES(run.pages))
			return;
		lz_helper_give(worker, task, &run, copy_pages);
	}
}

/* How much of a job the helper copies at once: what a fault may have to wait for, beside what it waits for anyway. */
static uint32_t helper_copy_pages(const struct lz_task *task, bool is_active)
{
	if (!is_active)
		return 8;
	return task->in_stream ? 16 : 4;
}

/* One bounded chunk of background fill for a task. True when something was done. */
static bool fill_task(struct lz_worker *worker, struct lz_task *task, uint64_t now)
{
	struct lz_engine *engine = worker->engine;
	struct lz_arena *arena = engine->arena;
	const bool is_active = has_faulted(task, now, ACTIVE_NS);
	const bool is_remote = engine->remote.link;
	/* Behind a stream of faults goes what it asks for next: there the large copy is the short way. */
	uint64_t budget = is_active && !(task->near && task->in_stream) ? ACTIVE_FILL_PAGES : IDLE_CHUNK_PAGES;
	uint64_t allowance = fill_allowance(engine, now), filled = 0;

	if (allowance < LZ_PAGE_SIZE)
		return false;
	if (is_remote)
		ask_for_fill(worker, task, has_faulted(task, now, REMOTE_ACTIVE_NS));
	if (lz_helper_rests(worker, now) || (is_active && task->scatter >= SCATTER_RANDOM))
		lz_helper_recall(worker, task);
	else if (allowance == UINT64_MAX && task->left_pages > HELP_PAGES)
		give_to_helper(worker, task, helper_copy_pages(task, is_active), now);
	if (budget > PAGES(allowance))
		budget = PAGES(allowance);
	for (uint32_t copies = 0; copies < CHUNK_COPIES && filled < budget; copies++) {
		struct lz_run run;
		uint32_t number = 0;
		int64_t near = task->near ? lz_space_find(arena, &task->space, task->near) : -1;
		bool found = false, awaited = false; /* what is near is still on its way */
		int result;

		if (near >= 0) {
			const struct lz_region *region = lz_space_region(arena, &task->space, (uint32_t)near);
			uint64_t page = PAGES(task->near - region->start);

			found = lz_space_next_missing(arena, &task->space, (uint32_t)near, page, page + NEAR_PAGES,
						      budget - filled, &run);
			awaited = found && !arrived_pages(worker, &run);
		}
		if (!found || awaited) {
			if (!awaited)
				task->near = 0;
			if (!lz_fill_next(worker, task, budget - filled, &run, &number)) {
				/* The last of it is with the helper, who may not have a processor. */
				lz_helper_recall(worker, task);
				if (!lz_fill_next(worker, task, budget - filled, &run, &number))
					return filled > 0 || lz_fill_done(worker, task);
			}
		}
		run.pages = arrived_pages(worker, &run);
		if (!run.pages)
			break;
		if (run.kind == LZ_KIND_DUMPED && !fetched_for_fill(worker, &run, !task->near))
			break;
		result = lz_install_run(worker, task, &run, LZ_BY_FILL);
		if (!lz_task_outcome(worker, task, result) || !lz_is_serving(task))
			break;
		filled += run.pages;
		if (near >= 0 && task->near && !awaited)
			task->near = run.start + BYTES(run.pages);
	}
	__atomic_add_fetch(&engine->shared->fill_spent, BYTES(filled), __ATOMIC_RELAXED);
	lz_count(&worker->counters->fill_ns, lz_now_ns() - now);
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
			run.pages = arrived_pages(worker, &run);
			if (!run.pages)
				break;
			if (!lz_task_outcome(worker, task, lz_install_run(worker, task, &run, LZ_BY_FAULT)) ||
			    !lz_is_serving(task))
				return;
			page = run.page + run.pages;
		}
	}
	task->near = 0;
}

/* One round of background work. True when something was done and the next round may do more. */
bool lz_fill(struct lz_worker *worker, uint64_t now)
{
	struct lz_engine *engine = worker->engine;
	bool full = __atomic_load_n(&engine->shared->fill, __ATOMIC_ACQUIRE) == LZ_FILL_FULL;

	if (!__atomic_load_n(&engine->shared->finished, __ATOMIC_ACQUIRE))
		return false;
	for (uint32_t tried = 0; tried < worker->tasks; tried++) {
		struct lz_task *task = worker->task[(worker->turn + tried) % worker->tasks];

		if (now < task->unsettled_ns)
			continue;
		if (task->batch.events)
			continue;
		if (task->handed_back != 1 && is_quiet(worker, task, now))
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
