/* SPDX-License-Identifier: MIT */
/*
 * Which pages of a task a dump takes, and what each is.
 *
 * The kernel's page tables are read in one of two ways. PAGEMAP_SCAN (Linux 6.7) walks them and returns ranges of equal
 * categories; what is not there costs nothing, so that 64 GiB of address space with little in it take milliseconds.
 * /proc/PID/pagemap has a word for every page; there the zero page is known by its frame number, which is learned from
 * a page of our own that was only read. Both need CAP_SYS_ADMIN to tell a marker from a swapped page and (the words)
 * the zero page from another; without it such pages are dumped, which costs bytes and is right.
 *
 * Facts (all seen on 6.18, tests/kernel/test_scan.py):
 * - A page that was only read is PFNZERO, huge or not. A zero page in a file mapping would differ from the file, so
 *   there it is dumped like any page of the task's own.
 * - A page of a private file mapping that the task has not written is FILE; its own copy is not.
 * - SWAPPED is said of real swap, of pages in migration, and of markers, which are no pages: guard pages (6.13; a
 *   category of their own from 6.15 on) and what is left of a write-protected page of a file mapping that was dropped.
 *   The last would look clean, though the task would read the file again. So every swapped page is looked up in the
 *   words, where a marker has a type of its own.
 * - walk_end says where a scan stopped only if the kernel filled its own buffer (512 regions) at most once; so the
 *   regions themselves say it.
 *
 * The order of decisions is the dump's contract: not mapped, zero, clean since the parent, else dumped.
 */
#define _GNU_SOURCE 1
#include "scan.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define KNOWN_FROM_THE_START 0x7fU /* 6.7: up to PAGE_IS_HUGE */
#define HUGE_BYTES (2ULL << 20)
#define HUGE_PAGES (HUGE_BYTES >> LZ_PAGE_SHIFT)

int lz_scan_ioctl(struct lz_scanner *scanner, const struct pm_scan_arg *what, uint64_t start, uint64_t end,
		  uint32_t max_regions, uint64_t *stopped)
{
	struct pm_scan_arg arg = *what;

	arg.size = sizeof(arg);
	arg.start = start;
	arg.end = end;
	arg.vec = max_regions ? (uint64_t)(uintptr_t)scanner->regions : 0;
	arg.vec_len = max_regions;
	for (;;) {
		int found = ioctl(scanner->pagemap, PAGEMAP_SCAN, &arg);
		if (found >= 0) {
			/* Not walk_end: after more than 512 regions it still says where the last 512 began. */
			bool is_full = max_regions && (uint32_t)found == max_regions;
			*stopped = is_full ? scanner->regions[found - 1].end : end;
			return found;
		}
		if (errno != EINTR && errno != EAGAIN)
			return -errno;
	}
}

int lz_scan_words(struct lz_scanner *scanner, uint64_t start, uint64_t end)
{
	size_t want = (size_t)((end - start) >> LZ_PAGE_SHIFT) * sizeof(uint64_t), there = 0;

	assert(want <= LZ_SCAN_WORDS * sizeof(uint64_t));
	while (there < want) {
		ssize_t got = pread(scanner->pagemap, (char *)scanner->words + there, want - there,
				    (off_t)((start >> LZ_PAGE_SHIFT) * sizeof(uint64_t) + there));
		if (got < 0) {
			if (errno == EINTR)
				continue;
			return -errno;
		}
		if (got == 0)
			return -ESRCH; /* the task has no memory any more */
		there += (size_t)got;
	}
	return 0;
}

static uint64_t frame_of(int pagemap, const void *page)
{
	uint64_t word = 0;

	if (pread(pagemap, &word, sizeof(word), (off_t)((uintptr_t)page >> LZ_PAGE_SHIFT) * 8) != sizeof(word))
		return 0;
	return word & LZ_PM_PRESENT ? word & LZ_PM_FRAME : 0;
}

/* Learn the frames of the zero page and of the huge one from mappings of our own that are only read. */
static void learn_zero_frames(struct lz_scanner *scanner)
{
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	size_t bytes = 2 * HUGE_BYTES;
	char *room = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (pagemap >= 0 && room != MAP_FAILED) {
		char *huge = (char *)(((uintptr_t)room + HUGE_BYTES - 1) & ~(uintptr_t)(HUGE_BYTES - 1));
		char *small = huge > room ? room : huge + HUGE_BYTES; /* outside of the aligned part */
		(void)*(volatile char *)small;
		scanner->zero_frame = frame_of(pagemap, small);
		if (madvise(huge, HUGE_BYTES, MADV_HUGEPAGE) == 0) {
			(void)*(volatile char *)huge;
			uint64_t frame = frame_of(pagemap, huge);
			/* Without a huge zero page there is the small one. */
			if (frame != scanner->zero_frame && frame % HUGE_PAGES == 0)
				scanner->huge_zero_frame = frame;
		}
		scanner->sees_frames = scanner->zero_frame != 0;
		scanner->huge = room;
		scanner->huge_bytes = bytes;
	} else if (room != MAP_FAILED) {
		munmap(room, bytes);
	}
	if (pagemap >= 0)
		close(pagemap);
}

/* Ask which categories PAGEMAP_SCAN knows here; 0: there is no such thing. */
static uint64_t known_categories(struct lz_scanner *scanner)
{
	static const uint64_t known[] = { KNOWN_FROM_THE_START | PAGE_IS_GUARD, KNOWN_FROM_THE_START };

	for (size_t i = 0; i < sizeof(known) / sizeof(*known); i++) {
		struct pm_scan_arg what = { .return_mask = known[i] };
		uint64_t stopped;
		if (lz_scan_ioctl(scanner, &what, LZ_PAGE_SIZE, LZ_PAGE_SIZE, 1, &stopped) >= 0)
			return known[i];
	}
	return 0;
}

struct lz_scanner *lz_scanner_open(int pid, int method, int *error)
{
	struct lz_scanner *scanner = calloc(1, sizeof(*scanner));
	char path[64];

	if (!scanner) {
		*error = -ENOMEM;
		return NULL;
	}
	snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
	scanner->pagemap = open(path, O_RDONLY | O_CLOEXEC);
	if (scanner->pagemap < 0) {
		*error = -errno;
		free(scanner);
		return NULL;
	}
	scanner->regions = malloc(LZ_SCAN_REGIONS * sizeof(*scanner->regions));
	scanner->words = malloc(LZ_SCAN_WORDS * sizeof(*scanner->words));
	*error = scanner->regions && scanner->words ? 0 : -ENOMEM;
	if (!*error && method != LZ_SCAN_PAGEMAP) {
		scanner->categories = known_categories(scanner);
		if (!scanner->categories && method == LZ_SCAN_IOCTL)
			*error = -ENOTTY;
	}
	if (*error) {
		lz_scanner_close(scanner);
		return NULL;
	}
	scanner->method = scanner->categories ? LZ_SCAN_IOCTL : LZ_SCAN_PAGEMAP;
	learn_zero_frames(scanner);
	return scanner;
}

void lz_scanner_close(struct lz_scanner *scanner)
{
	if (!scanner)
		return;
	close(scanner->pagemap);
	if (scanner->huge)
		munmap(scanner->huge, scanner->huge_bytes);
	free(scanner->regions);
	free(scanner->words);
	free(scanner);
}

int lz_scanner_method(const struct lz_scanner *scanner)
{
	return scanner->method;
}

/* One area on its way into the pipe. */
struct scan {
	struct lz_scanner *scanner;
	struct lz_page_pipe *pipe;
	const struct lz_area *area;
	int track;
};

/* Decide what pages of some categories are, and add them. `clean` is known by the area's own way of tracking. */
static int add(const struct scan *scan, uint64_t start, uint64_t end, uint64_t categories, bool clean)
{
	uint64_t pages = (end - start) >> LZ_PAGE_SHIFT;
	bool is_file = scan->area->kind == LZ_AREA_FILE;
	int kind = LZ_PAGE_DUMPED;

	if (!(categories & (PAGE_IS_PRESENT | PAGE_IS_SWAPPED)) || categories & PAGE_IS_GUARD)
		return 0;
	scan->pipe->scanned_pages += pages;
	if (is_file && categories & PAGE_IS_FILE)
		return 0;
	if (categories & PAGE_IS_PFNZERO && !is_file)
		kind = LZ_PAGE_ZERO;
	else if (clean && scan->area->flags & LZ_AREA_TRUSTED)
		kind = LZ_PAGE_PARENT;
	return lz_pipe_add(scan->pipe, start, pages, kind, scan->area->flags & LZ_AREA_LAZY);
}

static bool is_zero_frame(const struct lz_scanner *scanner, uint64_t frame)
{
	uint64_t huge = scanner->huge_zero_frame;

	return frame && (frame == scanner->zero_frame || (huge && frame >= huge && frame < huge + HUGE_PAGES));
}

/* What a word says, in the categories of PAGEMAP_SCAN. */
static uint64_t categories_of(const struct lz_scanner *scanner, uint64_t word)
{
	uint64_t categories = 0;

	if (word & LZ_PM_GUARD)
		return PAGE_IS_GUARD;
	if (word & LZ_PM_PRESENT) {
		categories = PAGE_IS_PRESENT;
		if (is_zero_frame(scanner, word & LZ_PM_FRAME))
			categories |= PAGE_IS_PFNZERO;
	} else if (word & LZ_PM_SWAPPED) {
		uint64_t marker = (word & LZ_PM_FRAME) >> 5;
		/* A poisoned page is one that cannot be read: it must fail the dump, not vanish from it. */
		if (scanner->sees_frames && (word & LZ_PM_SWAP_TYPE) == LZ_PM_TYPE_MARKER &&
		    !(marker & LZ_PM_MARKER_POISONED))
			return 0;
		categories = PAGE_IS_SWAPPED;
	}
	if (word & LZ_PM_FILE)
		categories |= PAGE_IS_FILE;
	return categories;
}

/* A swap entry of which nobody can say whether it is a marker is not known to be clean. */
static bool is_clean_word(const struct scan *scan, uint64_t word)
{
	if (!(word & LZ_PM_PRESENT) && !scan->scanner->sees_frames)
		return false;
	if (scan->track == LZ_TRACK_SOFT_DIRTY)
		return !(word & LZ_PM_SOFT_DIRTY);
	return scan->track == LZ_TRACK_UFFD && word & LZ_PM_UFFD_WP;
}

/* Classify [start, end) by its words. */
static int scan_words(const struct scan *scan, uint64_t start, uint64_t end)
{
	struct lz_scanner *scanner = scan->scanner;

	while (start < end) {
		uint64_t pages = (end - start) >> LZ_PAGE_SHIFT;
		if (pages > LZ_SCAN_WORDS)
			pages = LZ_SCAN_WORDS;
		int result = lz_scan_words(scanner, start, start + (pages << LZ_PAGE_SHIFT));
		if (result < 0)
			return result;
		for (uint64_t i = 0; i < pages; i++) {
			uint64_t word = scanner->words[i];
			if (!word)
				continue;
			uint64_t at = start + (i << LZ_PAGE_SHIFT);
			result = add(scan, at, at + LZ_PAGE_SIZE, categories_of(scanner, word),
				     is_clean_word(scan, word));
			if (result < 0)
				return result;
		}
		start += pages << LZ_PAGE_SHIFT;
	}
	return 0;
}

static int scan_by_ioctl(const struct scan *scan)
{
	struct lz_scanner *scanner = scan->scanner;
	bool soft_dirty = scan->track == LZ_TRACK_SOFT_DIRTY && scan->area->flags & LZ_AREA_TRUSTED;
	struct pm_scan_arg what = {
		.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
		.return_mask =
			(PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO | PAGE_IS_GUARD) & scanner->categories,
	};
	uint64_t at = scan->area->start;

	if (scan->area->kind == LZ_AREA_FILE)
		what.return_mask |= PAGE_IS_FILE;
	if (scan->area->flags & LZ_AREA_TRUSTED && scan->track == LZ_TRACK_UFFD)
		what.return_mask |= PAGE_IS_WRITTEN | PAGE_IS_WPALLOWED;
	while (at < scan->area->end) {
		int found = lz_scan_ioctl(scanner, &what, at, scan->area->end, LZ_SCAN_REGIONS, &at);
		if (found < 0)
			return found;
		for (int i = 0; i < found; i++) {
			const struct page_region *region = &scanner->regions[i];
			uint64_t said = region->categories & (PAGE_IS_WRITTEN | PAGE_IS_WPALLOWED);
			bool by_word = region->categories & PAGE_IS_SWAPPED && !(region->categories & PAGE_IS_GUARD);
			int result;
			if (by_word || soft_dirty)
				result = scan_words(scan, region->start, region->end);
			else
				result = add(scan, region->start, region->end, region->categories,
					     said == PAGE_IS_WPALLOWED);
			if (result < 0)
				return result;
		}
	}
	return 0;
}

int lz_scan(struct lz_scanner *scanner, int track, const struct lz_area *areas, uint64_t count,
	    struct lz_page_pipe *pipe)
{
	for (uint64_t i = 0; i < count; i++) {
		struct scan scan = { .scanner = scanner, .pipe = pipe, .area = &areas[i], .track = track };
		int result;
		assert(areas[i].start < areas[i].end && (i == 0 || areas[i - 1].end <= areas[i].start));
		assert(!((areas[i].start | areas[i].end) & (LZ_PAGE_SIZE - 1)));
		if (areas[i].kind == LZ_AREA_WHOLE) {
			uint64_t pages = (areas[i].end - areas[i].start) >> LZ_PAGE_SHIFT;
			pipe->scanned_pages += pages;
			result =
				lz_pipe_add(pipe, areas[i].start, pages, LZ_PAGE_DUMPED, areas[i].flags & LZ_AREA_LAZY);
		} else if (scanner->method == LZ_SCAN_IOCTL) {
			result = scan_by_ioctl(&scan);
		} else {
			result = scan_words(&scan, areas[i].start, areas[i].end);
		}
		if (result < 0)
			return result;
	}
	return 0;
}

int lz_scan_file(int fd, uint64_t bytes, struct lz_page_pipe *pipe)
{
	off_t at = 0, end = (off_t)bytes;

	while (at < end) {
		off_t data = lseek(fd, at, SEEK_DATA);
		if (data < 0)
			return errno == ENXIO ? 0 : -errno;
		off_t hole = lseek(fd, data, SEEK_HOLE);
		if (hole < 0)
			return -errno;
		data &= ~(off_t)(LZ_PAGE_SIZE - 1);
		if (data < at)
			data = at;
		hole = (hole + (off_t)LZ_PAGE_SIZE - 1) & ~(off_t)(LZ_PAGE_SIZE - 1);
		if (hole > end)
			hole = end;
		if (data >= hole)
			return 0;
		uint64_t pages = (uint64_t)(hole - data) >> LZ_PAGE_SHIFT;
		int result = lz_pipe_add(pipe, (uint64_t)data, pages, LZ_PAGE_DUMPED, 0);
		if (result < 0)
			return result;
		pipe->scanned_pages += pages;
		at = hole;
	}
	return 0;
}
