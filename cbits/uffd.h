/* SPDX-License-Identifier: MIT */
/*
 * The system calls on a userfaultfd, each in one place. Kernel facts (fs/userfaultfd.c, mm/userfaultfd.c; each has a
 * test in tests/c or tests/kernel):
 *
 * - COPY and ZEROPAGE answer -EAGAIN while the layout is changing, as errno with the result field untouched or in the
 *   field; a partial result comes with errno EAGAIN and says how much is in. So the field is zeroed first and a
 *   partial result is reported beside the error.
 * - An error with nothing installed is about the first page: pages are installed in order.
 * - The layout check comes before everything else in COPY, then the search for the VMA, then the layout check once
 *   more, then the read of the source. So a COPY from an address that cannot be read installs nothing and tells what
 *   the layout is: -EAGAIN it is changing, -ENOENT the range is not inside one registered VMA, -EFAULT it is, -ESRCH
 *   the memory is gone.
 * - A change between the first check and the search makes -ENOENT of what is changing. So -ENOENT means that a range
 *   is not there only if the layout is seen settled after it: the calls here ask, and answer -EAGAIN if it is not.
 */
#ifndef LZ_UFFD_H
#define LZ_UFFD_H

#include "abi.h"
#include "lz.h"

/* Copy [source, source + length) to run address start. 0, or -errno with *done bytes installed all the same. */
int lz_uffd_copy(int uffd, uint64_t start, const void *source, uint64_t length, uint64_t *done);
/* Map the zero page over a range. As lz_uffd_copy. */
int lz_uffd_zero(int uffd, uint64_t start, uint64_t length, uint64_t *done);
/* Make every missing page of a range raise SIGBUS. As lz_uffd_copy; -ENOTTY or -EINVAL before Linux 6.6. */
int lz_uffd_poison(int uffd, uint64_t start, uint64_t length, uint64_t *done);
/* Let the threads that wait on a range fault again. */
int lz_uffd_wake(int uffd, uint64_t start, uint64_t length);
int lz_uffd_register(int uffd, uint64_t start, uint64_t length);
int lz_uffd_unregister(int uffd, uint64_t start, uint64_t length);
/* Ask what the layout is, changing nothing: -EAGAIN, -ENOENT, -EFAULT or -ESRCH as above. */
int lz_uffd_probe(int uffd, uint64_t start, uint64_t length);
/* Ask whether the layout is changing or the memory gone: 0 neither, -EAGAIN, -ESRCH. */
int lz_uffd_settled(int uffd);

#endif
