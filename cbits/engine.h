/* SPDX-License-Identifier: MIT */
/* What the parts of the engine share: its tasks, its workers, its sources. */
#ifndef LZ_ENGINE_H
#define LZ_ENGINE_H

#include "abi.h"
#include "helper.h"
#include "io.h"
#include "layout.h"
#include "remote.h"
#include "space.h"

#include <pthread.h>

#define LZ_MAX_TASKS 65536U
#define LZ_MAX_SOURCES 65536U
#define LZ_MAX_WORKERS 16U
#define LZ_STREAMS 8U
#define LZ_PENDING 8192U
#define LZ_NOTICES 4096U
#define LZ_MESSAGES 64U
#define LZ_FRESH_PAGES 256U

/* A place in the address space that faults move forward from. */
struct lz_stream {
	uint64_t next; /* run address after the last window */
	uint32_t streak;
	uint32_t age;
};

/*
 * How far applying a task's events is, so that a process that goes on in the place of one that died does each once. One
 * word: a batch is there or is applied as a whole, and there is nothing in between to die in.
 */
struct lz_batch {
	_Alignas(8) uint16_t events;
	uint16_t ordered;  /* events whose order is decided, in order; 0: none is being applied */
	uint16_t progress; /* atomic: twice the number applied, plus 1 while saved is the truth */
	uint16_t half;     /* where the events are */
};

/* One task. Lives in the arena; owned by one worker once attached, apart from status. */
struct lz_task {
	struct lz_space space;
	int32_t image_pid;
	int32_t run_pid;
	int32_t parent;
	int32_t uffd;
	uint64_t born_ns; /* read_ns of its fork's event: no other child of its parent has it */
	uint32_t status;  /* enum lz_task_status; atomic */
	int32_t closing;  /* plus 1: its uffd, while it is being closed; 0: none */
	uint32_t number;
	uint32_t worker;
	uint32_t fill_region; /* regions before it are done */
	uint32_t stream_clock;
	uint64_t help_at; /* run address where the helper's half goes on; 0: not begun */
	/* Where asking a page server goes on: what is missing before is asked for, unless the generation has changed.
	 */
	uint32_t ask_region, ask_generation;
	uint64_t ask_page;
	uint64_t ask_lead;   /* bytes that were asked of the page server before the fill can install them, about */
	uint32_t help_done;  /* its half is full: it goes on where the worker does */
	uint32_t jobs;       /* of it that the helper has */
	uint32_t scatter;    /* how random its faults have been of late: up to SCATTER_MOST */
	uint32_t in_stream;  /* its last fault was one of a stream */
	uint32_t backoff_ns; /* next wait after an EAGAIN */
	uint64_t image_pages;
	uint64_t left_pages;   /* atomic for readers */
	uint64_t last_fault;   /* run address */
	uint64_t near;         /* run address where background fill goes on after a fault; 0: none */
	uint64_t empty_ns;     /* when its queue was last seen empty */
	uint64_t fault_ns;     /* when it last faulted */
	uint64_t unsettled_ns; /* its layout was changing: leave it alone until then */
	uint64_t probe_ns;     /* when to look whether its memory is still there */
	uint64_t held_pages;   /* neither installed nor poisoned: their faults stay blocked */
	uint64_t event_ns;     /* when its last layout event was read, or it came */
	uint64_t watched_ns;   /* when its unsettled layout was last looked at */
	struct lz_batch batch;
	struct lz_event event[2][LZ_BATCH_ROOM]; /* read, not applied yet: see layout.h; the half that batch says */
	uint8_t order[LZ_BATCH_ROOM];
	struct lz_space saved; /* the regions before a change that is not complete */
	uint32_t applying;     /* this process is at it */
	uint32_t adopted_late; /* taken up from a process that died in the middle: a fork may be there already */
	uint32_t handed_back;  /* regions were looked at for what can go back to the kernel at once */
	struct lz_stream stream[LZ_STREAMS];
};

struct lz_fault {
	uint64_t address; /* run address of its page */
	bool to_write;
};

/* A fault that could not be answered yet. */
struct lz_pending {
	struct lz_task *task;
	struct lz_fault fault;
	uint64_t since_ns;
	uint32_t read; /* what it waits for: a read of its page, its arrival (LZ_REMOTE_READ), or LZ_NO_READ */
};

struct lz_source {
	int fd;
	const uint8_t *map;
	uint64_t size;
	int64_t mtime_s, mtime_ns;
	uint32_t told;   /* atomic: the change was reported */
	bool is_landing; /* pages of a page server: there when they have arrived, and nobody else's to change */
};

/* Counters of one worker, in the arena; written by it alone, read by anyone. */
struct lz_counters {
	uint64_t faults, fault_copied_pages, fill_copied_pages, zero_pages, present_pages, poisoned_pages;
	uint64_t dropped_pages, forks, remaps, removes, unmaps, again, unregistered_pages;
	uint64_t fault_ns_max, fault_ns_sum, fill_ns;
	uint64_t fault_ns[LZ_LATENCY_BUCKETS];
};

/* What a worker, or its helper, has seen of a source a moment ago. */
struct lz_source_view {
	uint64_t start, end; /* bytes that were in memory */
	uint64_t checked_ns; /* when it was seen to be checked_bytes long */
	uint64_t checked_bytes;
	uint64_t next;  /* where the last question about its memory ended */
	uint64_t asked; /* plus 1: where the fill last had bytes read; asked twice means they cannot be */
};

struct lz_worker {
	struct lz_engine *engine;
	struct lz_counters *counters;
	struct lz_flight *flight;
	pthread_t thread;
	bool running;
	int epoll;
	int wake;
	uint32_t number;
	uint32_t tasks;
	uint32_t task_capacity;
	uint32_t turn; /* whose background fill is next */
	uint32_t pendings;
	uint32_t outstanding; /* tasks with events that are not applied yet */
	struct lz_task **task;
	struct lz_pending pending[LZ_PENDING + LZ_READS];
	pthread_mutex_t inbox_lock;
	struct lz_helper helper;
	const void *zeros;              /* LZ_FRESH_PAGES that read as zeros; NULL: none could be had */
	struct lz_source_view *view[2]; /* enum lz_for: one a source */
	uint32_t inbox_count;           /* atomic */
	uint32_t inbox_capacity;
	struct lz_task **inbox;
};

/*
 * What a worker is in the middle of, in the arena: if this process dies, the next one goes on from here. A message is
 * read into it and cleared once it is kept or applied.
 */
struct lz_flight {
	uint32_t task; /* whose messages these are */
	struct uffd_msg message[LZ_MESSAGES];
	uint32_t handing_task; /* plus 1: being handed back, not known to be safe yet */
	uint64_t handing_start;
	uint64_t handing_end;
};

/* The engine's state that outlives a process, in the arena. */
struct lz_shared {
	uint32_t tasks;     /* atomic */
	uint32_t finished;  /* atomic: the restore is finished */
	uint32_t fill;      /* atomic enum lz_fill */
	uint64_t fill_rate; /* atomic */
	uint64_t fill_start_ns;
	uint64_t fill_spent;                /* atomic: bytes filled since then */
	uint64_t task_offset[LZ_MAX_TASKS]; /* of struct lz_task */
};

struct lz_engine {
	struct lz_config config;
	struct lz_arena *arena;
	struct lz_shared *shared;
	uint32_t begun;       /* atomic: workers that have made what they need */
	uint32_t stopping;    /* atomic: workers are to end */
	uint32_t abandoning;  /* atomic: and poison what is missing */
	pthread_mutex_t lock; /* sources, tasks */
	struct lz_source *source;
	uint32_t sources;
	int notify;
	int *reserve_fd; /* held so that a fork's descriptor can always be received; under lock */
	uint32_t reserve_fds;
	pthread_mutex_t notice_lock;
	uint32_t notices, notice_first;
	uint64_t notices_lost;
	struct lz_notice notice[LZ_NOTICES];
	struct lz_io io;
	struct lz_remote remote;
	uint32_t workers;
	struct lz_worker worker[LZ_MAX_WORKERS];
};

/*
 * Named points: a test build (-DLZ_TEST_POINTS) links its own lz_point and can hold a worker there while the task it
 * serves does something else. In the product they are nothing.
 */
#ifdef LZ_TEST_POINTS
__attribute__((weak)) void lz_point(const char *name, uint64_t address);
#define LZ_POINT(name, address) (lz_point ? lz_point(name, address) : (void)0)
#else
#define LZ_POINT(name, address) ((void)0)
#endif

void *lz_worker_main(void *worker);
/* Make a worker look at its inbox, its pending faults and the engine's flags now. */
void lz_engine_wake_worker(struct lz_worker *worker);
int lz_engine_add_task(struct lz_engine *engine, const struct lz_task *like, struct lz_task **task);
void lz_engine_notify(struct lz_engine *engine, const struct lz_notice *notice);
struct lz_task *lz_engine_task_at(struct lz_engine *engine, uint32_t number);
uint64_t lz_now_ns(void);

#endif
