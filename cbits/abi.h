/* SPDX-License-Identifier: MIT */
/*
 * Kernel interface numbers that the distribution's headers are too old for (Debian 12 ships 6.1's).
 * Each is guarded, so that newer headers win. Source: include/uapi/linux/userfaultfd.h and fs.h of the release named,
 * and Documentation/admin-guide/mm/pagemap.rst for the words of /proc/PID/pagemap.
 */
#ifndef LZ_ABI_H
#define LZ_ABI_H

#include <linux/fs.h>
#include <linux/types.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

#ifndef USERFAULTFD_IOC_NEW /* 6.1: /dev/userfaultfd */
#define USERFAULTFD_IOC 0xAA
#define USERFAULTFD_IOC_NEW _IO(USERFAULTFD_IOC, 0x00)
#endif

#ifndef UFFD_FEATURE_POISON /* 6.6 */
#define UFFD_FEATURE_POISON (1 << 14)
#define _UFFDIO_POISON (0x08)
struct uffdio_poison {
	struct uffdio_range range;
#define UFFDIO_POISON_MODE_DONTWAKE ((__u64)1 << 0)
	__u64 mode;
	__s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, _UFFDIO_POISON, struct uffdio_poison)
#endif

#ifndef UFFD_FEATURE_WP_UNPOPULATED /* 6.4 */
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC /* 6.7 */
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif

#ifndef PAGEMAP_SCAN /* 6.7 */
#define PAGE_IS_WPALLOWED (1 << 0)
#define PAGE_IS_WRITTEN (1 << 1)
#define PAGE_IS_FILE (1 << 2)
#define PAGE_IS_PRESENT (1 << 3)
#define PAGE_IS_SWAPPED (1 << 4)
#define PAGE_IS_PFNZERO (1 << 5)
#define PAGE_IS_HUGE (1 << 6)
struct page_region {
	__u64 start;
	__u64 end;
	__u64 categories;
};
#define PM_SCAN_WP_MATCHING (1 << 0)
#define PM_SCAN_CHECK_WPASYNC (1 << 1)
struct pm_scan_arg {
	__u64 size;
	__u64 flags;
	__u64 start;
	__u64 end;
	__u64 walk_end;
	__u64 vec;
	__u64 vec_len;
	__u64 max_pages;
	__u64 category_inverted;
	__u64 category_mask;
	__u64 category_anyof_mask;
	__u64 return_mask;
};
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#endif
#ifndef PAGE_IS_GUARD /* 6.15 */
#define PAGE_IS_GUARD (1 << 8)
#endif

#ifndef MADV_POPULATE_WRITE /* 5.14, asm-generic/mman-common.h */
#define MADV_POPULATE_WRITE 23
#endif

/* Words of /proc/PID/pagemap. Bits 0 to 54 are the frame; of a page that is swapped, 5 bits of type and an offset. */
#define LZ_PM_FRAME ((1ULL << 55) - 1)
#define LZ_PM_SWAP_TYPE 31ULL
#define LZ_PM_SOFT_DIRTY (1ULL << 55)
#define LZ_PM_UFFD_WP (1ULL << 57)
#define LZ_PM_GUARD (1ULL << 58)
#define LZ_PM_FILE (1ULL << 61)
#define LZ_PM_SWAPPED (1ULL << 62)
#define LZ_PM_PRESENT (1ULL << 63)
/*
 * A swap entry of this type is no page but a marker (include/linux/swapops.h, the last of 32 types); the offset says
 * which: 1 write-protected by userfaultfd, 2 poisoned, 4 guard. Seen on 6.18: 0x1f with offset 1 and 4.
 */
#define LZ_PM_TYPE_MARKER 31ULL
#define LZ_PM_MARKER_POISONED 2ULL

#endif
