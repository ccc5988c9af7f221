/* SPDX-License-Identifier: MIT */
/*
 * Which pages a task has not written since an earlier dump.
 *
 * With a userfaultfd that was opened in the task's mm: an area is registered for asynchronous write-protection
 * (UFFD_FEATURE_WP_ASYNC, Linux 6.7), its mapped pages are write-protected, and a page whose protection is still there
 * was not written: the kernel takes it away on the first write, its own included, without stopping the task.
 *
 * Facts (all seen on 6.18, tests/kernel/test_track.py):
 * - What is mapped later (populated, mapped anew, grown, moved here, brought back by DONTUNMAP) has no protection. A
 *   new mapping never merges with a registered one, nor does an area that mremap moves stay registered.
 * - An area that mremap moves beside another one may merge with it and take the registration of both away. The pages
 *   keep their protection bits in an area that nobody watches: they are written and still look protected. So bits mean
 *   something only in an area that was registered all the time, and are cleared when one is registered again.
 * - PAGEMAP_SCAN says of an area whether it is registered for this (WPALLOWED), but not with whom. Registering says so:
 *   EBUSY if somebody else watches it. So an area is asked about first and registered then; one that was registered
 *   before and is ours afterwards was ours all the time.
 * - UFFDIO_WRITEPROTECT over an area, and PAGEMAP_SCAN without room for an answer, protect what is not mapped, too, by
 *   markers that need page tables: 64 GiB of them for nothing. So only what is mapped is protected, and the answers are
 *   read. Nor are guard pages touched.
 * - A huge page is protected whole and split on the first write. A child of fork has no protection. Descriptors that
 *   are closed take the protection and the registration with them.
 *
 * With soft-dirty bits (CONFIG_MEM_SOFT_DIRTY; /proc/PID/clear_refs clears them all) nothing needs to be done in the
 * task; but anybody may clear them, and nothing says whether an area was looked at by the dump before. So there, what
 * the parent's images do not have is never taken for clean (lz_pipe_require_parent).
 */
#define _GNU_SOURCE 1
#include "scan.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static int clear_soft_dirty(const char *path)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC), result = 0;

	if (fd < 0)
		return -errno;
	if (write(fd, "4", 1) != 1)
		result = -errno;
	close(fd);
	return result;
}

static bool is_soft_dirty(int pagemap, const void *page)
{
	uint64_t word = 0;

	if (pread(pagemap, &word, sizeof(word), (off_t)((uintptr_t)page >> LZ_PAGE_SHIFT) * 8) != sizeof(word))
		return false;
	return word & LZ_PM_SOFT_DIRTY;
}

/* Try on pages of our own that soft-dirty bits are there and do what is said of them. */
static bool has_soft_dirty(void)
{
	char *room = mmap(NULL, 2 * LZ_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	volatile char *written = room, *left = room + LZ_PAGE_SIZE;
	bool works = false;

	if (room != MAP_FAILED && pagemap >= 0) {
		*written = 1;
		*left = 1;
		works = is_soft_dirty(pagemap, room) && clear_soft_dirty("/proc/self/clear_refs") == 0 &&
			!is_soft_dirty(pagemap, room);
		*written = 2;
		works = works && is_soft_dirty(pagemap, room) && !is_soft_dirty(pagemap, room + LZ_PAGE_SIZE);
	}
	if (pagemap >= 0)
		close(pagemap);
	if (room != MAP_FAILED)
		munmap(room, 2 * LZ_PAGE_SIZE);
	return works;
}

int lz_track_open(int uffd)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_WP_ASYNC };

	return ioctl(uffd, UFFDIO_API, &api) < 0 ? -errno : 0;
}

static bool has_async_protection(void)
{
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	bool works = uffd >= 0 && lz_track_open(uffd) == 0;

	if (uffd >= 0)
		close(uffd);
	return works;
}

int lz_track_method(void)
{
	if (has_soft_dirty())
		return LZ_TRACK_SOFT_DIRTY;
	return has_async_protection() ? LZ_TRACK_UFFD : LZ_TRACK_NONE;
}

static int register_area(int uffd, const struct lz_area *area)
{
	struct uffdio_register arg = {
		.range = { .start = area->start, .len = area->end - area->start },
		.mode = UFFDIO_REGISTER_MODE_WP,
	};

	return ioctl(uffd, UFFDIO_REGISTER, &arg) < 0 ? -errno : 0;
}

static int unregister(int uffd, uint64_t start, uint64_t end)
{
	struct uffdio_range range = { .start = start, .len = end - start };

	return ioctl(uffd, UFFDIO_UNREGISTER, &range) < 0 ? -errno : 0;
}

static int unprotect(int uffd, const struct lz_area *area)
{
	struct uffdio_writeprotect arg = { .range = { .start = area->start, .len = area->end - area->start } };

	return ioctl(uffd, UFFDIO_WRITEPROTECT, &arg) < 0 ? -errno : 0;
}

/* Say whether all of an area is registered for asynchronous write-protection, with whomever: 1, 0, or -errno. */
static int is_registered(struct lz_scanner *scanner, const struct lz_area *area)
{
	static const struct pm_scan_arg unregistered = {
		.category_inverted = PAGE_IS_WPALLOWED,
		.category_mask = PAGE_IS_WPALLOWED,
		.return_mask = PAGE_IS_WPALLOWED,
	};
	uint64_t at = area->start;

	while (at < area->end) {
		int found = lz_scan_ioctl(scanner, &unregistered, at, area->end, 1, &at);
		if (found)
			return found < 0 ? found : 0;
	}
	return 1;
}

int lz_track_check(struct lz_scanner *scanner, int track, int uffd, struct lz_area *areas, uint64_t count)
{
	int result = 0;

	for (uint64_t i = 0; i < count; i++) {
		struct lz_area *area = &areas[i];
		area->flags &= ~(uint32_t)LZ_AREA_TRUSTED;
		if (track == LZ_TRACK_NONE || area->kind == LZ_AREA_WHOLE || result)
			continue;
		if (track == LZ_TRACK_UFFD) {
			int registered = scanner->categories ? is_registered(scanner, area) : 0;
			if (registered < 0)
				result = registered;
			if (registered <= 0)
				continue;
			int owned = register_area(uffd, area);
			if (owned == -ESRCH)
				result = owned;
			if (owned < 0)
				continue;
		}
		area->flags |= LZ_AREA_TRUSTED;
	}
	/* What is half known is not known. */
	for (uint64_t i = 0; result && i < count; i++)
		areas[i].flags &= ~(uint32_t)LZ_AREA_TRUSTED;
	return result;
}

/* Write-protect what is mapped in an area; of one that was tracked before, what was written since. */
static int protect(struct lz_scanner *scanner, const struct lz_area *area)
{
	struct pm_scan_arg what = {
		.flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
		.category_inverted = PAGE_IS_GUARD & scanner->categories,
		.category_mask = PAGE_IS_GUARD & scanner->categories,
		.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
		.return_mask = PAGE_IS_PRESENT,
	};
	uint64_t at = area->start;

	if (area->flags & LZ_AREA_TRUSTED)
		what.category_mask |= PAGE_IS_WRITTEN;
	while (at < area->end) {
		int found = lz_scan_ioctl(scanner, &what, at, area->end, LZ_SCAN_REGIONS, &at);
		if (found < 0)
			return found;
	}
	return 0;
}

/* Track one area: 1, 0 if it cannot be, or -errno if nothing can be. */
static int arm(struct lz_scanner *scanner, int uffd, struct lz_area *area)
{
	int result = register_area(uffd, area);

	if (result < 0)
		return result == -ESRCH ? result : 0;
	if (!(area->flags & LZ_AREA_TRUSTED)) {
		result = unprotect(uffd, area);
		if (result < 0) {
			/* Bits of an earlier life may be left: nobody may ever believe them. */
			result = unregister(uffd, area->start, area->end);
			return result < 0 ? result : 0;
		}
	}
	result = protect(scanner, area);
	if (result < 0)
		return result;
	area->flags |= LZ_AREA_ARMED;
	return 1;
}

int64_t lz_track_arm(struct lz_scanner *scanner, int track, int uffd, int pid, struct lz_area *areas, uint64_t count)
{
	uint64_t end = LZ_USER_START;
	int64_t armed = 0;

	for (uint64_t i = 0; i < count; i++)
		areas[i].flags &= ~(uint32_t)LZ_AREA_ARMED;
	if (track == LZ_TRACK_SOFT_DIRTY) {
		char path[64];
		snprintf(path, sizeof(path), "/proc/%d/clear_refs", pid);
		int result = clear_soft_dirty(path);
		if (result < 0)
			return result;
		for (uint64_t i = 0; i < count; i++)
			areas[i].flags |= areas[i].kind == LZ_AREA_WHOLE ? 0 : LZ_AREA_ARMED;
		return (int64_t)count;
	}
	assert(track == LZ_TRACK_UFFD);
	for (uint64_t i = 0; i <= count; i++) {
		bool last = i == count;
		uint64_t start = last ? LZ_USER_END : areas[i].start;
		/* What this dump has not looked at, the next one must not find clean. EINVAL: nothing is mapped there.
		 */
		if (end < start && unregister(uffd, end, start) == -ESRCH)
			return -ESRCH;
		if (last)
			break;
		end = areas[i].end;
		if (areas[i].kind == LZ_AREA_WHOLE) {
			unregister(uffd, areas[i].start, areas[i].end);
			continue;
		}
		int result = arm(scanner, uffd, &areas[i]);
		if (result < 0)
			return result;
		armed += result;
	}
	return armed;
}
