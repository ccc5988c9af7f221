/* SPDX-License-Identifier: MIT */
/* What scan.c and track.c share: a task's open page tables. */
#ifndef LZ_SCAN_H
#define LZ_SCAN_H

#include "abi.h"
#include "lz.h"

struct lz_scanner {
	int pagemap;         /* /proc/PID/pagemap */
	int method;          /* LZ_SCAN_IOCTL or LZ_SCAN_PAGEMAP */
	uint64_t categories; /* of PAGEMAP_SCAN, that this kernel knows */
	bool sees_frames;    /* pagemap words carry frame numbers and swap entries: CAP_SYS_ADMIN */
	uint64_t zero_frame;
	uint64_t huge_zero_frame; /* the first of 512, or 0: there is none */
	void *huge;               /* keeps the huge zero page from being given back while it is compared with */
	size_t huge_bytes;
	struct page_region *regions;
	uint64_t *words;
};

#define LZ_SCAN_REGIONS 4096U
#define LZ_SCAN_WORDS (64U << 10)

/* One PAGEMAP_SCAN over [start, end): how many regions were filled in, or -errno; *stopped is where it stopped. */
int lz_scan_ioctl(struct lz_scanner *scanner, const struct pm_scan_arg *what, uint64_t start, uint64_t end,
		  uint32_t max_regions, uint64_t *stopped);
/* Read the pagemap words of [start, end), at most LZ_SCAN_WORDS of them. 0 or -errno. */
int lz_scan_words(struct lz_scanner *scanner, uint64_t start, uint64_t end);

#endif
