/* SPDX-License-Identifier: MIT */
/* Where the parts of a thread's extended state lie: only the processor knows (Intel's manual, CPUID leaf 13). */
#include "lz.h"

#include <cpuid.h>
#include <errno.h>

int lz_xstate_part(uint32_t number, uint32_t *offset, uint32_t *size)
{
	uint32_t flags, reserved;

	if (number < 2 || number > 62) /* the first two are the legacy area, which has no entry of its own */
		return -EINVAL;
	if (!__get_cpuid_count(13, number, size, offset, &flags, &reserved) || *size == 0)
		return -ENOENT;
	return 0;
}
