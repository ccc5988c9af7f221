/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE 1
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A test build can be told that its kernel is older than UFFDIO_POISON (6.6). */
#ifdef LZ_TEST_POINTS
extern int lz_lacks_poison __attribute__((weak));
#define LZ_LACKS_POISON (&lz_lacks_poison && lz_lacks_poison)
#else
#define LZ_LACKS_POISON false
#endif

#define UNREADABLE_BYTES (2 * LZ_PAGE_SIZE) /* as long as a probe is */

/* An address of ours that cannot be read. Addresses below vm.mmap_min_addr will not do: they are -EINVAL. */
static const void *unreadable(uint64_t length)
{
	static const void *page;

	if (length > UNREADABLE_BYTES)
		return NULL;
	if (!__atomic_load_n(&page, __ATOMIC_ACQUIRE)) {
		void *none =
			mmap(NULL, UNREADABLE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

		if (none == MAP_FAILED)
			return NULL;
		__atomic_store_n(&page, none, __ATOMIC_RELEASE); /* two at once: one is lost, and no harm done */
	}
	return page;
}

/* errno of a failed ioctl whose result field holds `field`. */
static int failure(int64_t field, uint64_t *done)
{
	int error = errno;

	if (field > 0)
		*done = (uint64_t)field;
	else if (field < 0)
		error = (int)-field;
	return -error;
}

/* The same, and whether -ENOENT can be believed. */
static int settled_failure(int uffd, int64_t field, uint64_t *done)
{
	int result = failure(field, done);

	if (result == -ENOENT && !*done && lz_uffd_settled(uffd) == -EAGAIN)
		return -EAGAIN;
	return result;
}

int lz_uffd_copy(int uffd, uint64_t start, const void *source, uint64_t length, uint64_t *done)
{
	struct uffdio_copy copy = { .dst = start, .src = (uint64_t)(uintptr_t)source, .len = length };

	*done = 0;
	if (ioctl(uffd, UFFDIO_COPY, &copy) < 0)
		return settled_failure(uffd, copy.copy, done);
	*done = length;
	return 0;
}

int lz_uffd_zero(int uffd, uint64_t start, uint64_t length, uint64_t *done)
{
	struct uffdio_zeropage zero = { .range = { .start = start, .len = length } };

	*done = 0;
	if (ioctl(uffd, UFFDIO_ZEROPAGE, &zero) < 0)
		return settled_failure(uffd, zero.zeropage, done);
	*done = length;
	return 0;
}

int lz_uffd_poison(int uffd, uint64_t start, uint64_t length, uint64_t *done)
{
	struct uffdio_poison poison = { .range = { .start = start, .len = length } };

	*done = 0;
	if (LZ_LACKS_POISON)
		return -EINVAL;
	if (ioctl(uffd, UFFDIO_POISON, &poison) < 0)
		return settled_failure(uffd, poison.updated, done);
	*done = length;
	return 0;
}

int lz_uffd_wake(int uffd, uint64_t start, uint64_t length)
{
	struct uffdio_range range = { .start = start, .len = length };

	return ioctl(uffd, UFFDIO_WAKE, &range) < 0 ? -errno : 0;
}

int lz_uffd_register(int uffd, uint64_t start, uint64_t length)
{
	struct uffdio_register request = {
		.range = { .start = start, .len = length },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	return ioctl(uffd, UFFDIO_REGISTER, &request) < 0 ? -errno : 0;
}

int lz_uffd_unregister(int uffd, uint64_t start, uint64_t length)
{
	struct uffdio_range range = { .start = start, .len = length };

	return ioctl(uffd, UFFDIO_UNREGISTER, &range) < 0 ? -errno : 0;
}

int lz_uffd_probe(int uffd, uint64_t start, uint64_t length)
{
	struct uffdio_copy copy = { .dst = start, .src = (uint64_t)(uintptr_t)unreadable(length), .len = length };
	uint64_t done = 0;

	if (!copy.src)
		return -ENOMEM;
	return ioctl(uffd, UFFDIO_COPY, &copy) < 0 ? failure(copy.copy, &done) : -EFAULT;
}

int lz_uffd_settled(int uffd)
{
	int result = lz_uffd_probe(uffd, LZ_USER_END - LZ_PAGE_SIZE, LZ_PAGE_SIZE);

	return result == -EAGAIN || result == -ESRCH ? result : result == -ENOSPC ? -ESRCH : 0;
}

int lz_uffd_open(int *through)
{
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	int uffd;

	*through = 1;
	if (device >= 0) {
		uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
		close(device);
		if (uffd >= 0)
			return uffd;
	}
	*through = 2;
	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	return uffd < 0 ? -errno : uffd;
}
