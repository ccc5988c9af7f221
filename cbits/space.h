/* SPDX-License-Identifier: MIT */
/* What the engine needs of a space beside what lz.h shows to everyone. */
#ifndef LZ_SPACE_H
#define LZ_SPACE_H

#include "arena.h"

/* The extent that holds an image address, or NULL and in *gap_end where the next one starts. */
const struct lz_extent *lz_space_extent(struct lz_arena *arena, const struct lz_space *space, uint64_t image_address,
					uint64_t *gap_end);
/* The rows of a space's table, which its forks share. */
struct lz_extent *lz_space_rows(struct lz_arena *arena, const struct lz_space *space);
/* Whether a space is the only one that uses its table: it has no forks, or they have ended. */
bool lz_space_is_alone(struct lz_arena *arena, const struct lz_space *space);
/* Length in pages of the run from a region's page on, at most `pages`, that is all missing (or all not). */
uint64_t lz_space_state_run(struct lz_arena *arena, const struct lz_space *space, const struct lz_region *region,
			    uint64_t page, uint64_t pages, bool missing);
/* Number of the first region that ends after a run address; space->regions where there is none. */
uint32_t lz_space_first_after(struct lz_arena *arena, const struct lz_space *space, uint64_t address);
/* Make every page that is asked for missing again, and the fill begin anew: nobody knows who asked. */
void lz_space_forget_asked(struct lz_arena *arena, struct lz_space *space);
/*
 * Keep a copy of a space's regions in *saved, whose array is its own and is used again, unless the space was put back
 * from it, by assignment, and so has it. If the process dies in between, *saved is fit to be saved to again.
 */
int lz_space_save(struct lz_arena *arena, const struct lz_space *space, struct lz_space *saved);
/* Drop what was saved, before the space is. */
void lz_space_drop_saved(struct lz_arena *arena, const struct lz_space *space, struct lz_space *saved);
/*
 * Find the regions that touch a done region end to end. True, and which, when all of them are done: only then does
 * no VMA that they share with others hold a missing page.
 */
bool lz_space_done_block(struct lz_arena *arena, const struct lz_space *space, uint32_t number, uint32_t *first,
			 uint32_t *count);

#endif
