/* SPDX-License-Identifier: MIT */
/*
 * lz.h: the one public header of lazyd's C core.
 *
 * The regions between `cffi:` marks are also what the Python side sees: scripts/build_backend.py feeds them to cffi
 * (common goes to every compiled module, the others to the module they name), so that no struct or constant is typed
 * twice. Inside them only what cffi's parser understands: no #if, no static inline.
 *
 * Functions return >= 0 or -errno; errno is read in the one place that makes the system call; out-parameters come
 * last. Lengths are bytes unless the name ends in _pages. Ranges are half-open.
 */
#ifndef LZ_H
#define LZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* What depends on the architecture. x86-64: 4 KiB pages, user space ends one guard page below 2^47. */
#if defined(__x86_64__)
#define LZ_PAGE_SHIFT 12
#define LZ_USER_START 0x10000ULL /* vm.mmap_min_addr as it ships */
#define LZ_USER_END 0x7ffffffff000ULL
#else
#error "lazyd: name this architecture's page size and end of user space here"
#endif
#define LZ_PAGE_SIZE (1ULL << LZ_PAGE_SHIFT)

/* cffi: common */
/* What the bytes of an extent are. */
enum lz_kind {
	LZ_KIND_DUMPED = 1, /* in a local pages image, at offset */
	LZ_KIND_ZERO = 2,   /* zeros, said so by an entry */
	LZ_KIND_REMOTE = 3, /* only a page server has them */
	LZ_KIND_BROKEN = 4, /* a parent hole that no ancestor covers: never served, only reported */
};

/*
 * A run of pages with one source: one row of a task's flat table of extents. Rows are sorted by start and disjoint.
 * 24 bytes, so that a million of them are 24 MB.
 */
struct lz_extent {
	uint64_t start;  /* image address, page-aligned */
	uint64_t offset; /* bytes into the source's pages image; LZ_KIND_BROKEN: level of the chain; else 0 */
	uint32_t pages;  /* > 0 */
	uint16_t source; /* index into the list of pages images; 0 unless LZ_KIND_DUMPED */
	uint8_t kind;    /* enum lz_kind */
	uint8_t lazy;    /* 1: may be restored lazily; 0: the restorer fills it before the task runs */
};
/* cffi: end */

/* cffi: pagemap */
/* The one message of a pagemap entry has been written in two ways that clash; see cbits/pagemap.c. */
enum lz_dialect {
	LZ_DIALECT_NONE = 0,
	LZ_DIALECT_BOOLEANS = 1,
	LZ_DIALECT_FLAGS = 2,
};

/* What an entry has been seen to use: bits of lz_pagemap.seen, to be OR-ed over a whole chain. */
enum lz_seen {
	LZ_SEEN_FIELD_4 = 1,    /* any entry with field 4 */
	LZ_SEEN_FIELD_5 = 2,    /* any entry with field 5 */
	LZ_SEEN_FLAGS = 4,      /* what only the flags dialect writes: 4 above 1, 5 above 1, 2 = 0 beside 5 */
	LZ_SEEN_BARE = 8,       /* a dumped entry without field 4: booleans, if LZ_SEEN_FIELD_4 is set anywhere */
	LZ_SEEN_LAZY_BOOL = 16, /* a field 5 of 0 or 1 beside a field 2 that is not 0: hints at booleans */
	LZ_SEEN_PARENT = 32,    /* any entry that may be a parent hole: field 3, or bit 0 of field 4 */
};

/* What is wrong with a pagemap image; `detail` says what the two numbers in lz_pagemap_error are. */
enum lz_bad {
	LZ_BAD_NOTHING = 0,
	LZ_BAD_MAGIC = 1,         /* found, expected */
	LZ_BAD_TRUNCATED = 2,     /* bytes wanted, bytes there */
	LZ_BAD_LENGTH = 3,        /* record length, longest accepted */
	LZ_BAD_NO_HEAD = 4,       /* */
	LZ_BAD_VARINT = 5,        /* */
	LZ_BAD_UNKNOWN_FIELD = 6, /* field number, wire type */
	LZ_BAD_WIRE_TYPE = 7,     /* field number, wire type */
	LZ_BAD_MISSING_FIELD = 8, /* field number */
	LZ_BAD_FIELD_RANGE = 9,   /* field number, value */
	LZ_BAD_FLAG_BITS = 10,    /* field 4 */
	LZ_BAD_COUNTS = 11,       /* field 2, field 5 */
	LZ_BAD_UNALIGNED = 12,    /* */
	LZ_BAD_NO_PAGES = 13,     /* */
	LZ_BAD_USER_SPACE = 14,   /* pages, end of user space */
	LZ_BAD_UNSORTED = 15,     /* start, end of the entry before */
	LZ_BAD_OVERLAP = 16,      /* start, end of the entry before */
	LZ_BAD_COMBINATION = 17, /* field 3 (0 or 1) | field 4 << 1 | field 5 << 4 as the dialect reads them, dialect */
	LZ_BAD_NOT_BOOLEAN = 18, /* field number, value: the booleans dialect cannot say this */
	LZ_BAD_PAGES_SHORT = 19, /* where in the pages image the run starts, pages of the run */
};

struct lz_pagemap_error {
	uint64_t offset;  /* in the image: of the record, or of the field inside it */
	uint64_t address; /* image address, if has_address */
	uint64_t detail[2];
	int32_t code; /* enum lz_bad */
	uint8_t has_offset;
	uint8_t has_address;
};

/* An entry as written, the dialect still open. 16 bytes. */
struct lz_entry {
	uint64_t word; /* image address; its low bits, which alignment leaves free, say what fields were there */
	uint64_t pages;
};

struct lz_pagemap {
	struct lz_entry *entries;
	uint64_t count;
	uint64_t flags_offset; /* offset and address of the first entry with LZ_SEEN_FLAGS */
	uint64_t flags_address;
	uint64_t bare_offset; /* the same for LZ_SEEN_BARE */
	uint64_t bare_address;
	uint32_t pages_id;
	uint32_t seen; /* enum lz_seen, OR-ed */
};

struct lz_table {
	struct lz_extent *rows;
	uint64_t count;
	uint64_t capacity;
	uint64_t image_bytes; /* how much of its pages image the last pushed pagemap names */
};

/*
 * Decode the pagemap image behind fd (read from offset 0, the file position stays) into *out, which the caller gives
 * back with lz_pagemap_free(). -EBADMSG: the image is bad and *error says how; else -errno of the read.
 */
int lz_pagemap_read(int fd, struct lz_pagemap *out, struct lz_pagemap_error *error);
void lz_pagemap_free(struct lz_pagemap *pagemap);

/* Find the record that covers an image address: 0 and *offset, -ENOENT, or what lz_pagemap_read() returns. */
int lz_pagemap_locate(int fd, uint64_t address, uint64_t *offset);

/*
 * Lay one image of a chain over the flat table of its ancestors. Start with a zeroed table and the oldest image.
 * `level` (< 65,536) names the image: it becomes `source` of its dumped rows and `offset` of its broken ones.
 * -EBADMSG: *error says which address (its offset is for lz_pagemap_locate() to find); the table is as before.
 */
int lz_table_push(struct lz_table *table, const struct lz_pagemap *pagemap, uint32_t level, int dialect,
		  uint64_t pages_image_bytes, struct lz_pagemap_error *error);
/* Say which sources dumped rows name: used[source] = 1. `used` has `levels` bytes, all zero before. */
void lz_table_used(const struct lz_table *table, uint8_t *used, uint32_t levels);
/* Rename the sources of dumped rows to map[source] and give back memory that the rows do not need. */
void lz_table_finish(struct lz_table *table, const uint16_t *map, uint32_t levels);
/* Add up pages by kind; pages[0] is not touched. */
void lz_table_pages(const struct lz_table *table, uint64_t pages[5]);
/* Return the index of the first row from `from` on whose kind is `kind`, or table->count. */
uint64_t lz_table_find_kind(const struct lz_table *table, uint64_t from, int kind);
void lz_table_free(struct lz_table *table);
/* Free rows that were taken out of a table. */
void lz_rows_free(struct lz_extent *rows);
/* cffi: end */

/* cffi: engine */
/* What a page is to its task: two bits a page, 32 pages a 64-bit word, first page in the lowest bits. */
enum lz_state {
	LZ_MISSING = 0, /* never installed: a fault gets what the table says of it */
	LZ_ASKED = 1,   /* on its way from a remote source, or held back because its bytes cannot be had */
	LZ_PRESENT = 2, /* installed, by us or by the restorer */
	LZ_REMOVED = 3, /* the task dropped it: a fault gets zeros */
};

/* A run of a task's address space that the engine serves, as the caller names it: a lazy VMA of the mm image. */
struct lz_vma {
	uint64_t start; /* image address; also the run address at the time of the handshake */
	uint64_t end;
	uint32_t flags; /* LZ_REGION_WIPED_ON_FORK or 0 */
};

/* A run of a task's address space that the engine serves. Regions are sorted by start and disjoint. */
struct lz_region {
	uint64_t start; /* run address */
	uint64_t pages;
	uint64_t image_start; /* image address of the page at start */
	uint64_t state_index; /* number of the first page's state in the space's states */
	uint64_t fill_page;   /* no image page before this page of the region is missing */
	uint32_t extent_hint; /* where the last search in the table ended; never trusted unchecked */
	uint32_t flags;       /* LZ_REGION_* */
};

enum lz_region_flags {
	LZ_REGION_DONE = 1,          /* no image page of it is missing */
	LZ_REGION_WIPED_ON_FORK = 2, /* MADV_WIPEONFORK: the child of a fork has zeros here, and no event says so */
};

/*
 * What the engine knows of one task's address space: which run address shows which image address, and the state of
 * every page. Lives in the arena, so offsets instead of pointers. Pure data: no system call is made on it.
 */
struct lz_space {
	uint64_t table_offset;   /* struct lz_flat_table, shared with the forks of the task */
	uint64_t regions_offset; /* struct lz_region[region_capacity] */
	uint64_t states_offset;  /* uint64_t[], two bits a page */
	uint64_t state_pages;
	uint32_t regions;
	uint32_t region_capacity;
};

/* A run of missing pages that have one source and are contiguous in the task and in the source. */
struct lz_run {
	uint64_t start; /* run address */
	uint64_t pages;
	uint64_t offset; /* bytes into the source */
	uint64_t page;   /* number of the first page inside its region */
	uint16_t source;
	uint8_t kind; /* LZ_KIND_DUMPED or LZ_KIND_REMOTE */
};

struct lz_arena;

/*
 * The arena: one memfd that holds all state another process would need to go on. Owned by the caller; all spaces in
 * it die with it. Returns NULL and -errno in *error.
 */
struct lz_arena *lz_arena_new(int *error);
void lz_arena_free(struct lz_arena *arena);

/*
 * Make a space over a copy of the extents (sorted, disjoint) and one region a VMA (sorted, disjoint, page-aligned).
 * Every page is missing. -EINVAL for rows out of order, -ENOMEM.
 */
int lz_space_init(struct lz_arena *arena, struct lz_space *space, const struct lz_extent *extents, uint64_t count,
		  const struct lz_vma *vmas, uint32_t vma_count);
/*
 * Make a copy for the child of a fork: same regions and states, the table shared; what is wiped on fork is removed.
 */
int lz_space_fork(struct lz_arena *arena, const struct lz_space *parent, struct lz_space *child);
void lz_space_drop(struct lz_arena *arena, struct lz_space *space);

/* The layout events, as the kernel reports them: run addresses, page-aligned. */
int lz_space_remap(struct lz_arena *arena, struct lz_space *space, uint64_t from, uint64_t to, uint64_t length);
int lz_space_unmap(struct lz_arena *arena, struct lz_space *space, uint64_t start, uint64_t end);
void lz_space_remove(struct lz_arena *arena, struct lz_space *space, uint64_t start, uint64_t end);

/* Number of the region that holds a run address, or -1. */
int64_t lz_space_find(struct lz_arena *arena, const struct lz_space *space, uint64_t address);
const struct lz_region *lz_space_region(struct lz_arena *arena, const struct lz_space *space, uint32_t number);
enum lz_state lz_space_state(struct lz_arena *arena, const struct lz_space *space, uint64_t address);
void lz_space_mark(struct lz_arena *arena, struct lz_space *space, uint64_t start, uint64_t pages, enum lz_state state);
/*
 * Find the first run of missing image pages (dumped or remote) in pages [page, limit_page) of a region; at most
 * max_pages long. Returns 1 and *run, or 0 where there is none.
 */
int lz_space_next_missing(struct lz_arena *arena, struct lz_space *space, uint32_t region, uint64_t page,
			  uint64_t limit_page, uint64_t max_pages, struct lz_run *run);
/* Count the image pages that are missing in a range of run addresses. */
uint64_t lz_space_count_missing(struct lz_arena *arena, struct lz_space *space, uint64_t start, uint64_t end);

enum lz_fill {
	LZ_FILL_OFF = 0, /* on demand only: faults and their neighbours */
	LZ_FILL_FULL = 1,
};

struct lz_config {
	uint32_t workers;            /* threads; tasks are dealt out over them */
	uint32_t fill;               /* enum lz_fill */
	uint64_t fill_rate;          /* bytes a second over all tasks, 0: no limit */
	uint32_t fault_around_pages; /* window of a fault that shows no pattern; 1: the page alone */
};

/* One thing worth telling, from a worker to whoever reports. */
enum lz_notice_kind {
	LZ_NOTICE_TASK_FILLED = 1,    /* every image page of the task is in; its uffd is closed */
	LZ_NOTICE_TASK_GONE = 2,      /* its memory is gone: it exited, was killed or called exec */
	LZ_NOTICE_FORKED = 3,         /* task is the child's number, value the parent's */
	LZ_NOTICE_UNREADABLE = 4,     /* value pages at address poisoned: their bytes cannot be read; error why */
	LZ_NOTICE_HELD = 5,           /* as UNREADABLE, but the kernel cannot poison: their faults stay blocked */
	LZ_NOTICE_SOURCE_CHANGED = 6, /* the pages image (source) was written or cut while it was served */
	LZ_NOTICE_TASK_FAILED = 7, /* the task cannot be served any more: error why; its missing pages are poisoned */
	LZ_NOTICE_LOST = 8,        /* value notices were dropped because nobody read them */
	LZ_NOTICE_SUSPECT = 9,     /* pages at address may have been installed from a source that was cut meanwhile */
	LZ_NOTICE_LINK = 10,       /* the link to the page server is of no use any more: see lz_engine_link() */
};

struct lz_notice {
	uint32_t kind;
	uint32_t task;
	uint64_t address; /* run address */
	uint64_t value;
	uint32_t source;
	int32_t error; /* -errno */
};

enum lz_task_status {
	LZ_TASK_PREPARED = 0, /* loaded; its uffd has not come yet */
	LZ_TASK_SERVING = 1,
	LZ_TASK_FILLED = 2,
	LZ_TASK_GONE = 3,
	LZ_TASK_FAILED = 4,
};

struct lz_task_info {
	int32_t image_pid;
	int32_t run_pid;      /* 0: not known (a fork event names no pid) */
	uint32_t status;      /* enum lz_task_status */
	int32_t parent;       /* number of the task it was forked from, or -1 */
	uint64_t image_pages; /* dumped or remote pages in its regions when it was prepared or forked */
	uint64_t left_pages;  /* of those, how many are still missing */
};

#define LZ_LATENCY_BUCKETS 512

/* Sums over all workers. Counted since the engine started. */
struct lz_totals {
	uint64_t faults;             /* messages read */
	uint64_t fault_copied_pages; /* installed by a fault: its page and its neighbours */
	uint64_t fill_copied_pages;  /* installed in the background */
	uint64_t zero_pages;         /* installed by ZEROPAGE */
	uint64_t present_pages;      /* were there already: EEXIST, or a fault on an installed page */
	uint64_t poisoned_pages;
	uint64_t dropped_pages; /* missing image pages that the task unmapped or dropped before they were read */
	uint64_t image_pages;   /* to be installed, over all tasks, forks included */
	uint64_t left_pages;    /* still missing */
	uint64_t forks, remaps, removes, unmaps;
	uint64_t again;              /* EAGAIN: the layout was changing */
	uint64_t unregistered_pages; /* handed back to the kernel before the end */
	uint64_t fault_ns_max;
	uint64_t fault_ns_sum;
	uint64_t fill_ns; /* time spent in background copies */
	/* Latency of faults, at most: from the last moment the queue was seen empty until the page was in.
	 * Bucket of x ns: x < 16: x; else 16 * (exponent - 3) + next four bits below the leading one. */
	uint64_t fault_ns[LZ_LATENCY_BUCKETS];
	uint32_t tasks;   /* ever attached, forks included */
	uint32_t serving; /* status LZ_TASK_SERVING now */
};

struct lz_engine;

/* Make an engine; no thread runs yet. NULL and -errno in *error. The caller frees it. */
struct lz_engine *lz_engine_new(const struct lz_config *config, int *error);
/* Add a pages image: fd is duplicated and mapped. Returns its number, the `source` of extents, or -errno. */
int lz_engine_add_source(struct lz_engine *engine, int fd);

/* Why a link is of no use any more. */
enum lz_link_reason {
	LZ_LINK_FAILED = 1,    /* the error says it */
	LZ_LINK_ENDED = 2,     /* the other side has hung up */
	LZ_LINK_COMMAND = 3,   /* an answer that is none: first word found, wanted */
	LZ_LINK_PID = 4,       /* of another task: pid found, wanted */
	LZ_LINK_ADDRESS = 5,   /* of other pages: address found, wanted */
	LZ_LINK_PAGES = 6,     /* of none, or more than were asked for: pages found, wanted at most */
	LZ_LINK_UNASKED = 7,   /* bytes that nobody asked for */
	LZ_LINK_UNCOUNTED = 8, /* a process died, and it is not known what it had received */
};

/* A GET, and what its answer brings. */
struct lz_question {
	uint64_t address, pages;
	int32_t pid;
};

enum lz_answer_kind {
	LZ_ANSWER_BYTES = 1,   /* the pages follow */
	LZ_ANSWER_ZEROS = 2,   /* they are zeros, and nothing follows */
	LZ_ANSWER_NOTHING = 3, /* the server does not have them, and nothing follows */
};

struct lz_answer {
	uint64_t pages;
	uint64_t found, wanted; /* of what is wrong */
	uint32_t kind;          /* enum lz_answer_kind */
	uint32_t speaks_lazyd;
};

/* Read the header of an answer: 0, or why it is none to this question, as enum lz_link_reason. */
int lz_answer_read(const uint8_t *header, uint32_t header_bytes, const struct lz_question *question,
		   struct lz_answer *answer);

/* How the link to the page server is. */
struct lz_link_info {
	uint64_t bytes;     /* of pages received, over all connections */
	uint64_t in_flight; /* bytes of pages on their way */
	uint64_t requests;  /* ever made */
	uint64_t waiting;   /* of these, how many are not answered */
	uint64_t round_trip_ns, rate;
	uint64_t detail[2];
	uint32_t reason; /* enum lz_link_reason, if error */
	int32_t error;   /* 0: it is up */
	uint32_t speaks_lazyd;
	uint32_t header_bytes;
	int32_t fd; /* -1: there is none */
};

/*
 * Have remote pages come from a page server, over a connected stream on which nothing is on its way; before any task is
 * prepared. Its descriptor passes on success. header_bytes: 24 or 32. Returns the number of a source, or -errno.
 */
int lz_engine_add_remote(struct lz_engine *engine, int fd, uint32_t header_bytes);
/* Go on over another connection, after a LINK notice: what was on its way is asked again. As above. */
int lz_engine_relink(struct lz_engine *engine, int fd, uint32_t header_bytes);
void lz_engine_link(struct lz_engine *engine, struct lz_link_info *info);
/* Prepare a task: its table and regions are copied in and checked. Returns the task's number or -errno. */
int lz_engine_prepare(struct lz_engine *engine, int image_pid, const struct lz_extent *extents, uint64_t count,
		      const struct lz_vma *vmas, uint32_t vma_count);
/* Start the workers. */
int lz_engine_start(struct lz_engine *engine);
/*
 * While no thread runs here, in a copy of the process that shares its descriptors (lz_fork_keeping_fds) or in the same
 * one after lz_engine_stop: take up the tasks that were served when the workers ended, whatever ended them. Before
 * lz_engine_start. Returns how many, or -errno.
 */
int lz_engine_resume(struct lz_engine *engine);
/* Release a descriptor number that is held for forks, so that one can be received: 1, or 0 if none is left. */
int lz_engine_spend_reserve(struct lz_engine *engine);
/* Give back the descriptors that are held for forks, while no thread runs. */
void lz_engine_release_reserve(struct lz_engine *engine);

/* What a descriptor is to the state that is shared. */
enum lz_descriptor {
	LZ_DESCRIPTOR_UNKNOWN = 0,
	LZ_DESCRIPTOR_SERVED = 1, /* the userfaultfd of a task, or of a fork that is not applied yet; or the link's */
	LZ_DESCRIPTOR_DONE = 2,   /* one that was to be closed, its task having ended, when the process died */
};

/* Fill is[0..count), by descriptor, with enum lz_descriptor; while no process serves. */
void lz_engine_descriptors(struct lz_engine *engine, uint8_t *is, uint32_t count);
/* Whether the restore was said to be finished, by this process or by the one before. */
int lz_engine_is_finished(struct lz_engine *engine);
/*
 * Fork a child that shares this process's table of descriptors: what one opens or receives the other has, and what is
 * open stays open until both are gone. Only while there is one thread. Returns as fork does, or -errno.
 */
int lz_fork_keeping_fds(void);
/* Put `changed` into a word that processes share if it is `old`, in one step: 1, else 0. */
int lz_swap(uint64_t *word, uint64_t old, uint64_t changed);
/* Open a descriptor that gives whoever reads it the signals that are pending for that process: the fd or -errno. */
int lz_signals_open(const int *numbers, uint32_t count);
/* Give a prepared task its uffd (ownership passes on success) and its pid as seen from here (0: not known). */
int lz_engine_attach(struct lz_engine *engine, uint32_t task, int uffd, int run_pid);
/* The restore is finished: every range is registered, background fill may start. */
void lz_engine_finish_restore(struct lz_engine *engine);
/* From now on fill fully and without a limit, whatever the configuration said. */
void lz_engine_hurry(struct lz_engine *engine);
/*
 * Give up: poison every missing image page of every task, then close the uffds and end the workers. A task that runs
 * on gets SIGBUS where a byte cannot be had, never zeros. Blocks until done.
 */
void lz_engine_abandon(struct lz_engine *engine);
/* End the workers; the uffds stay open until lz_engine_free. */
void lz_engine_stop(struct lz_engine *engine);
void lz_engine_free(struct lz_engine *engine);

/* Readable when there is a notice or a task's status changed; owned by the engine. */
int lz_engine_notify_fd(struct lz_engine *engine);
/* Take one notice: 1 and *notice, or 0. */
int lz_engine_next_notice(struct lz_engine *engine, struct lz_notice *notice);
void lz_engine_totals(struct lz_engine *engine, struct lz_totals *totals);
int lz_engine_task(struct lz_engine *engine, uint32_t task, struct lz_task_info *info);
/* Smallest number of ns such that the given share (0..1) of faults took at most that; 0 without faults. */
uint64_t lz_latency_quantile(const struct lz_totals *totals, double share);

/*
 * Open a userfaultfd the way a restorer would, to learn whether this process may: the fd or -errno; *through says
 * which door failed last: 1 /dev/userfaultfd, 2 the system call.
 */
int lz_uffd_open(int *through);
/* cffi: end */

/* cffi: target */
/*
 * Say where a part of the extended state lies in an XSAVE area that is not compacted: its number is its bit in XCR0,
 * from 2 on. -ENOENT: this processor has no such part.
 */
int lz_xstate_part(uint32_t number, uint32_t *offset, uint32_t *size);

/* An open file of ours and the number that it gets in a new process. */
struct lz_placed_file {
	int source, target;
};

/* What a new process is to begin as. files are sorted by target, each target once, and are written to by the child. */
struct lz_spawn {
	int pid;
	int program; /* open; executed without arguments */
	int new_session, new_group;
	struct lz_placed_file *files; /* all others are closed */
	size_t file_count;
};

/*
 * Make a process with a given pid, an orphan, that waits. It executes the program when a byte is written to *go, which
 * is the caller's to close, and ends when that is closed before. -EEXIST: the pid is taken; -EPERM: it may not be
 * chosen.
 */
int lz_spawn_stub(const struct lz_spawn *spawn, int *go);

/* One system call of the list that cbits/stub.S works off. number: -1 ends the list; bit 32: it may fail. */
struct lz_call {
	uint64_t number, arguments[6], result;
};
/* cffi: end */

/* cffi: memory */
/* What a page is to a dump. A page that is none of these is not in the pagemap image at all. */
enum lz_page {
	LZ_PAGE_ZERO = 1,   /* the kernel's zero page: a zero hole */
	LZ_PAGE_PARENT = 2, /* clean since the parent was dumped: a parent hole */
	LZ_PAGE_DUMPED = 3, /* its bytes go into the pages image */
};

/* How the pages of an area are looked at. */
enum lz_area_kind {
	LZ_AREA_ANON = 1,  /* what is mapped is dumped */
	LZ_AREA_FILE = 2,  /* of what is mapped, only what differs from the file: the task's own copies */
	LZ_AREA_WHOLE = 3, /* every page is dumped, mapped or not (the vdso) */
};

enum lz_area_flags {
	LZ_AREA_LAZY = 1,    /* its pages may be restored lazily */
	LZ_AREA_TRUSTED = 2, /* written pages can be told: set by lz_track_check() */
	LZ_AREA_ARMED = 4,   /* writes are tracked from here on: set by lz_track_arm() */
};

/* A run of a task's address space to be looked at: page-aligned, inside one VMA. Lists are sorted and disjoint. */
struct lz_area {
	uint64_t start;
	uint64_t end;
	uint32_t kind;  /* enum lz_area_kind */
	uint32_t flags; /* enum lz_area_flags */
};

/* A run of pages of one kind. */
struct lz_page_run {
	uint64_t start;
	uint64_t pages;
	uint8_t kind; /* enum lz_page */
	uint8_t lazy;
	uint8_t padding[6];
};

/*
 * A page pipe: runs of pages and of holes in order of address. Neighbours are one run where they touch and are of one
 * kind and equally lazy. Start with a zeroed one.
 */
struct lz_page_pipe {
	struct lz_page_run *runs;
	uint64_t count;
	uint64_t capacity;
	uint64_t scanned_pages; /* mapped pages looked at, those that are the file's own included */
	uint64_t pages[4];      /* by enum lz_page */
	uint64_t lazy_pages;    /* of the dumped ones */
};

/* Append pages. 0, -ENOMEM, or -EINVAL if they do not lie behind all that are in the pipe. */
int lz_pipe_add(struct lz_page_pipe *pipe, uint64_t start, uint64_t pages, int kind, int lazy);
void lz_pipe_free(struct lz_page_pipe *pipe);

/* How a task's page tables are read. Both ways give the same answer. */
enum lz_scan_method {
	LZ_SCAN_AUTO = 0,
	LZ_SCAN_IOCTL = 1,   /* PAGEMAP_SCAN, Linux 6.7 */
	LZ_SCAN_PAGEMAP = 2, /* /proc/PID/pagemap, a word a page */
};

/* By what a page is known to be clean. */
enum lz_track {
	LZ_TRACK_NONE = 0,
	LZ_TRACK_UFFD = 1,       /* asynchronous write-protection by a userfaultfd of the task's mm */
	LZ_TRACK_SOFT_DIRTY = 2, /* soft-dirty bits */
};

struct lz_scanner;

/* Open a task's page tables; `method` is enum lz_scan_method. NULL and -errno in *error. */
struct lz_scanner *lz_scanner_open(int pid, int method, int *error);
void lz_scanner_close(struct lz_scanner *scanner);
int lz_scanner_method(const struct lz_scanner *scanner);
/*
 * Classify every page of the areas and append them to the pipe: not mapped, zero, clean, else dumped; in this order.
 * A page is clean only in an area that is LZ_AREA_TRUSTED. The task must not run. 0 or -errno.
 */
int lz_scan(struct lz_scanner *scanner, int track, const struct lz_area *areas, uint64_t count,
	    struct lz_page_pipe *pipe);

/* Say by what writes can be tracked on this kernel: enum lz_track, tried out on pages of our own. */
int lz_track_method(void);
/* Negotiate the features that tracking needs with a userfaultfd that was opened in the task's mm. 0 or -errno. */
int lz_track_open(int uffd);
/*
 * Mark those areas LZ_AREA_TRUSTED whose writes `uffd` has been tracking since lz_track_arm(), and no others. The
 * task must not run. 0 or -errno: -ESRCH if the mm of the uffd is gone (exec, exit), and nothing is trusted.
 */
int lz_track_check(struct lz_scanner *scanner, int track, int uffd, struct lz_area *areas, uint64_t count);
/*
 * Track writes from here on: after the pages have been classified, while the task still does not run. Areas that are
 * tracked are marked LZ_AREA_ARMED; what others hold counts as written next time. Returns how many, or -errno.
 */
int64_t lz_track_arm(struct lz_scanner *scanner, int track, int uffd, int pid, struct lz_area *areas, uint64_t count);

/* Where a copy stands, and what made it fail. May be read while the copy is being made. */
struct lz_copy_state {
	uint64_t copied_bytes;
	uint64_t address; /* of the page that could not be read, if code is not 0 and writing is 0 */
	int32_t code;     /* errno */
	uint32_t writing; /* 1: what failed is the write to the image or socket */
	uint32_t cancel;  /* set by anyone: give up with -ECANCELED */
};

/* Where the first bytes of a pages image are mapped, for copies straight into the page cache. Start with a zeroed one.
 */
struct lz_room {
	uint8_t *map;
	uint64_t bytes;
};

/*
 * Make room for a pages image that is to become `bytes` long: reserve its blocks, and have pages in the page cache for
 * the first `warm_bytes`, in *room. The file's size is anything afterwards. 0 or -errno; then *room may be empty.
 */
int lz_room_make(int fd, uint64_t bytes, uint64_t warm_bytes, struct lz_room *room);
void lz_room_free(struct lz_room *room);

/* Pages that are copied early are read, and known to be copied or not, in batches of so many bytes of the image. */
#define LZ_EARLY_BATCH_BYTES 262144

/*
 * Copy the dumped pages of a task into its pages image behind `out`, with up to `threads` threads, by way of the room
 * that was made for it as far as that goes. Reads what the task itself may not read, too. 0 or -errno, then *state
 * says what and where.
 */
int lz_copy_pages(int pid, const struct lz_page_pipe *pipe, int out, const struct lz_room *room, uint32_t threads,
		  struct lz_copy_state *state);
/* The same from a file (shared memory), where the runs' addresses are offsets. */
int lz_copy_file(int in, const struct lz_page_pipe *pipe, int out, const struct lz_room *room, uint32_t threads,
		 struct lz_copy_state *state);

/*
 * Copy the dumped pages of a pipe while the task still runs, one batch of the pages image after the other. done, a
 * zeroed byte for each batch, says which were copied: what is unmapped meanwhile is no error. Which of the bytes still
 * are the task's is for tracking to say, which must have begun before. 0 or -errno: nothing can be written, or
 * -ECANCELED.
 */
int lz_copy_early(int pid, const struct lz_page_pipe *pipe, int out, const struct lz_room *room, uint32_t threads,
		  uint8_t *done, struct lz_copy_state *state);
/*
 * Of a pipe of the stopped task, scanned with the tracking that began before `early` was copied: leave as parent holes
 * the clean pages that were copied early, and make all other clean pages dumped ones. 0 or -ENOMEM.
 */
int lz_early_match(struct lz_page_pipe *pipe, const struct lz_page_pipe *early, const uint8_t *done);
/*
 * Bring into the pipe's order what lz_copy_early() has put into `image`, and between it what lz_copy_pages() has put
 * into `late`: the pages image of lz_early_settle()'s pipe, in `image`. 0 or -errno.
 */
int lz_early_merge(const struct lz_page_pipe *pipe, const struct lz_page_pipe *early, int image, int late);
/* Add to `settled`, which is empty, all pages of a pipe, with clean ones as dumped ones. 0 or -ENOMEM. */
int lz_early_settle(const struct lz_page_pipe *pipe, struct lz_page_pipe *settled);
/* Add what a file of shared memory holds of [0, bytes) to a pipe. 0 or -errno. */
int lz_scan_file(int fd, uint64_t bytes, struct lz_page_pipe *pipe);

/* How entries are written. */
struct lz_entry_format {
	uint32_t dialect;    /* enum lz_dialect */
	uint32_t wide;       /* flags: the page count in field 5, as CRIU writes it from 4.2 on */
	uint32_t lazy_holes; /* flags: parent holes say, too, that they may be restored lazily */
};

/*
 * Write a pagemap image to `out` from its start on. The flags dialect has no zero holes: they are left out.
 * Returns its length in bytes or -errno.
 */
int64_t lz_pagemap_write(int out, uint32_t pages_id, const struct lz_page_pipe *pipe,
			 const struct lz_entry_format *format);
/*
 * Check that every parent hole of the pipe is covered, over its whole length, by rows whose bytes are there (dumped or
 * zero). 0, or -ENOENT and the first address that is not.
 */
int lz_pipe_check_parent(const struct lz_page_pipe *pipe, const struct lz_extent *rows, uint64_t count,
			 uint64_t *address);
/*
 * Dump what would be a parent hole, but for which the parent has no bytes: for trackers that cannot prove that the
 * parent has looked at an area. 0 or -ENOMEM.
 */
int lz_pipe_require_parent(struct lz_page_pipe *pipe, const struct lz_extent *rows, uint64_t count);
/*
 * Punch out of the parents' pages images (fds, by the rows' source) what the pipe has dumped or zero holes for.
 * Returns the bytes punched or -errno.
 */
int64_t lz_pipe_punch_parent(const struct lz_page_pipe *pipe, const struct lz_extent *rows, uint64_t count,
			     const int *fds);

/* How pages go to a page server. */
struct lz_stream_format {
	uint64_t dst_id;
	uint32_t header_bytes; /* 24 or 32 */
	uint32_t zero_holes;   /* 1: send zero holes, 0: leave them out */
	uint32_t lazy_holes;
};

/*
 * Send every run of the pipe to a page server as ADD_F messages, those of dumped runs followed by their bytes, which
 * come from the task `pid`, or from the file `in` if pid is 0. 0 or -errno as lz_copy_pages().
 */
int lz_stream_pages(int pid, int in, const struct lz_page_pipe *pipe, int out, const struct lz_stream_format *format,
		    struct lz_copy_state *state);
/* cffi: end */

/* cffi: server */
#define LZ_LOST_MAX 256

/*
 * What a page server can send of one task: its flat table, and the pages images by source. All stay the caller's; any
 * number of threads may use it at once.
 */
struct lz_shelf {
	uint64_t pid;
	const struct lz_extent *rows;
	uint64_t count;
	const int *fds;
	/* Pages that could not be read; the first LZ_LOST_MAX are never tried again. Of no meaning outside. */
	uint64_t lost_count;
	uint64_t lost[LZ_LOST_MAX];
};

struct lz_page_pipe;

/* Why lz_peer_run() has returned. */
enum lz_peer_event {
	LZ_PEER_ENDED = 0,      /* the client hung up between two messages */
	LZ_PEER_MESSAGE = 1,    /* head is a message that the caller has to answer, or to refuse */
	LZ_PEER_MISSING = 2,    /* pages that are not here were asked for: told once, and answered */
	LZ_PEER_UNREADABLE = 3, /* a pages image ended in the middle of an answer, or failed (code): hang up */
	LZ_PEER_UNWRITTEN = 4,  /* what arrives cannot be kept (code): told once, the rest is read and dropped */
	LZ_PEER_STALLED =
		5, /* nothing could be sent, or came of a message that has begun, for a timeout of the socket */
	LZ_PEER_UNSORTED = 6, /* head is an entry that does not lie behind the one before */
	LZ_PEER_CROWDED = 7,  /* head is one entry more than an image may have */
};

/*
 * One connected client of a page server, and what is on its way. Start with a zeroed one but for fd and header_bytes.
 * fd is a blocking stream socket; its timeouts (SO_RCVTIMEO, SO_SNDTIMEO) say what a stall is.
 */
struct lz_peer {
	int32_t fd;
	uint32_t header_bytes; /* 24 or 32 */
	uint8_t head[32];      /* the message that is worked on, as it came */
	uint32_t retry;        /* set by the caller: head is to be looked at again, things have changed */
	int32_t code;          /* errno of LZ_PEER_UNREADABLE (0: it ended) and LZ_PEER_UNWRITTEN */
	uint64_t address;      /* of LZ_PEER_MISSING, LZ_PEER_UNREADABLE and LZ_PEER_UNSORTED */
	uint64_t task;         /* of the first two */

	struct lz_shelf **shelves; /* set by the caller: the tasks whose GETs are answered here */
	uint64_t shelf_count;

	struct lz_page_pipe *pipe; /* set by the caller: the image that entries belong to; NULL: none is open */
	uint64_t image;            /* its id in messages */
	int32_t out;               /* its pages image */
	int32_t broken;            /* set by anyone: keep nothing of what arrives; the errno */
	uint64_t written_bytes;    /* how much of the pages image is there; reset by the caller */

	/* Since the start. */
	uint64_t answers;
	uint64_t sent_bytes; /* of pages */
	uint64_t zero_bytes; /* of pages, said to be zeros or sent as such */
	uint64_t missing_answers;
	uint64_t received_bytes; /* of pages, kept or not */

	/* Of no meaning outside. */
	uint8_t *input;
	uint32_t input_at, input_end;
	uint32_t head_filled; /* of a message that is not complete yet */
	uint32_t is_corked;
	uint64_t data_left; /* of an entry, to come */
	struct lz_shelf *reply_shelf;
	uint64_t reply_row, reply_at, reply_left; /* bytes of pages of an answer, to be sent */
	uint32_t reply_head_at, reply_head_left;
	uint8_t reply_head[32];
};

/*
 * Read what the client sends; answer GETs of tasks that have a shelf, and take entries of the open image; until there
 * is something for the caller: enum lz_peer_event. Goes on where it was when called again. Or -errno of the socket;
 * -ENODATA: the client hung up in the middle of a message; -ENOMEM.
 */
int lz_peer_run(struct lz_peer *peer);
/* Read the first `bytes` of the next message into head, where they stay for lz_peer_run(). As lz_peer_run(). */
int lz_peer_peek(struct lz_peer *peer, uint32_t bytes);
void lz_peer_free(struct lz_peer *peer);
/* cffi: end */

#endif
