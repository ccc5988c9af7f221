/* SPDX-License-Identifier: MIT */
/*
 * A task's address space as lazyd knows it: regions over run addresses, a state for every page, and the flat table of
 * extents over image addresses. No system call is made here, so all of it is tested against a naive model.
 *
 * A page's state is kept under the number it got when its VMA was loaded, not under an address: mremap moves a region
 * and its states stay where they are; a fork copies them in one go. A region is cut only by an event whose range ends
 * inside it. Image pages leave LZ_MISSING and never come back to it, so fill_page of a region only grows and a
 * background fill over the whole space is one pass.
 */
#include "space.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#define STATES_PER_WORD 32U
#define LOW_BITS 0x5555555555555555ULL

static struct lz_region *regions_of(struct lz_arena *arena, const struct lz_space *space)
{
	return LZ_AT(arena, struct lz_region, space->regions_offset);
}

static uint64_t *states_of(struct lz_arena *arena, const struct lz_space *space)
{
	return LZ_AT(arena, uint64_t, space->states_offset);
}

static const struct lz_flat_table *table_of(struct lz_arena *arena, const struct lz_space *space)
{
	return LZ_AT(arena, const struct lz_flat_table, space->table_offset);
}

static uint64_t region_end(const struct lz_region *region)
{
	return region->start + (region->pages << LZ_PAGE_SHIFT);
}

static uint64_t state_bytes(uint64_t pages)
{
	return (pages / STATES_PER_WORD + 1) * sizeof(uint64_t);
}

/* Bit mask of the states [first, first + count) of one word; first + count <= 32. */
static uint64_t word_mask(unsigned first, unsigned count)
{
	uint64_t mask = count == STATES_PER_WORD ? ~0ULL : (1ULL << (2 * count)) - 1;

	return mask << (2 * first);
}

static void states_set(uint64_t *words, uint64_t first, uint64_t count, enum lz_state state)
{
	const uint64_t pattern = LOW_BITS * (uint64_t)state;

	while (count) {
		unsigned at = (unsigned)(first % STATES_PER_WORD);
		unsigned n = STATES_PER_WORD - at < count ? STATES_PER_WORD - at : (unsigned)count;
		uint64_t mask = word_mask(at, n);
		uint64_t *word = &words[first / STATES_PER_WORD];

		*word = (*word & ~mask) | (pattern & mask);
		first += n;
		count -= n;
	}
}

static enum lz_state state_get(const uint64_t *words, uint64_t number)
{
	return (enum lz_state)(words[number / STATES_PER_WORD] >> (2 * (number % STATES_PER_WORD)) & 3);
}

/*
 * Length of the run, from first on and at most count, whose pages are all missing (want_missing) or all not.
 */
static uint64_t states_run(const uint64_t *words, uint64_t first, uint64_t count, bool want_missing)
{
	uint64_t done = 0;

	while (done < count) {
		unsigned at = (unsigned)((first + done) % STATES_PER_WORD);
		uint64_t left = count - done;
		unsigned n = STATES_PER_WORD - at < left ? STATES_PER_WORD - at : (unsigned)left;
		uint64_t word = words[(first + done) / STATES_PER_WORD];
		/* one low bit a page: set where the page ends the run */
		uint64_t there = (word | word >> 1) & LOW_BITS;
		uint64_t stop = (want_missing ? there : ~there & LOW_BITS) & word_mask(at, n);

		if (stop)
			return done + ((unsigned)__builtin_ctzll(stop) / 2 - at);
		done += n;
	}
	return count;
}

int lz_space_init(struct lz_arena *arena, struct lz_space *space, const struct lz_extent *extents, uint64_t count,
		  const struct lz_vma *vmas, uint32_t vma_count)
{
	uint64_t pages = 0, previous = 0;
	struct lz_flat_table *table;
	struct lz_region *regions;

	memset(space, 0, sizeof(*space));
	for (uint64_t i = 0; i < count; i++) {
		const struct lz_extent *row = &extents[i];

		if (row->start < previous || row->start % LZ_PAGE_SIZE || !row->pages || row->start >= LZ_USER_END)
			return -EINVAL;
		if (row->kind < LZ_KIND_DUMPED || row->kind > LZ_KIND_REMOTE)
			return -EINVAL;
		previous = row->start + ((uint64_t)row->pages << LZ_PAGE_SHIFT);
		if (previous > LZ_USER_END)
			return -EINVAL;
	}
	previous = 0;
	for (uint32_t i = 0; i < vma_count; i++) {
		if (vmas[i].start < previous || vmas[i].start >= vmas[i].end || vmas[i].end > LZ_USER_END ||
		    (vmas[i].start | vmas[i].end) % LZ_PAGE_SIZE)
			return -EINVAL;
		previous = vmas[i].end;
		pages += (vmas[i].end - vmas[i].start) >> LZ_PAGE_SHIFT;
	}

	space->table_offset = lz_arena_alloc(arena, sizeof(*table) + count * sizeof(*extents));
	space->region_capacity = vma_count + 64;
	space->regions_offset = lz_arena_alloc(arena, space->region_capacity * sizeof(*regions));
	space->state_pages = pages;
	space->states_offset = lz_arena_alloc(arena, state_bytes(pages));
	if (!space->table_offset || !space->regions_offset || !space->states_offset)
		return -ENOMEM; /* the caller drops the arena with what is in it */
	table = LZ_AT(arena, struct lz_flat_table, space->table_offset);
	table->references = 1;
	table->count = count;
	if (count)
		memcpy(table->extents, extents, count * sizeof(*extents));
	regions = regions_of(arena, space);
	pages = 0;
	for (uint32_t i = 0; i < vma_count; i++) {
		regions[i] = (struct lz_region){
			.start = vmas[i].start,
			.pages = (vmas[i].end - vmas[i].start) >> LZ_PAGE_SHIFT,
			.image_start = vmas[i].start,
			.state_index = pages,
			.flags = vmas[i].flags & LZ_REGION_WIPED_ON_FORK,
		};
		pages += regions[i].pages;
	}
	space->regions = vma_count;
	return 0;
}

int lz_space_fork(struct lz_arena *arena, const struct lz_space *parent, struct lz_space *child)
{
	struct lz_flat_table *table = LZ_AT(arena, struct lz_flat_table, parent->table_offset);
	struct lz_space copy = *parent;

	copy.regions_offset = lz_arena_alloc(arena, parent->region_capacity * sizeof(struct lz_region));
	copy.states_offset = lz_arena_alloc(arena, state_bytes(parent->state_pages));
	if (!copy.regions_offset || !copy.states_offset) {
		if (copy.regions_offset)
			lz_arena_release(arena, copy.regions_offset,
					 parent->region_capacity * sizeof(struct lz_region));
		return -ENOMEM;
	}
	__atomic_add_fetch(&table->references, 1, __ATOMIC_RELAXED);
	memcpy(regions_of(arena, &copy), regions_of(arena, parent), parent->regions * sizeof(struct lz_region));
	/* Only the states of the regions: those of VMAs handed back to the kernel are of no use to the child. */
	for (uint32_t i = 0; i < parent->regions; i++) {
		const struct lz_region *region = &regions_of(arena, parent)[i];
		uint64_t first = region->state_index / STATES_PER_WORD;
		uint64_t last = (region->state_index + region->pages - 1) / STATES_PER_WORD;

		memcpy(&states_of(arena, &copy)[first], &states_of(arena, parent)[first],
		       (last - first + 1) * sizeof(uint64_t));
	}
	/* After the copy: neighbours share words. */
	for (uint32_t i = 0; i < copy.regions; i++) {
		const struct lz_region *region = &regions_of(arena, &copy)[i];

		if (region->flags & LZ_REGION_WIPED_ON_FORK)
			states_set(states_of(arena, &copy), region->state_index, region->pages, LZ_REMOVED);
	}
	*child = copy;
	return 0;
}

void lz_space_forget_asked(struct lz_arena *arena, struct lz_space *space)
{
	for (uint32_t i = 0; i < space->regions; i++) {
		struct lz_region *region = &regions_of(arena, space)[i];

		region->fill_page = 0;
		region->flags &= ~(uint32_t)LZ_REGION_DONE;
		for (uint64_t page = 0; page < region->pages; page++) {
			uint64_t *words = states_of(arena, space), number = region->state_index + page;

			if (number % STATES_PER_WORD == 0 && region->pages - page >= STATES_PER_WORD &&
			    !(words[number / STATES_PER_WORD] & ~(words[number / STATES_PER_WORD] >> 1) & LOW_BITS)) {
				page += STATES_PER_WORD - 1; /* none in this word */
				continue;
			}
			if (state_get(words, number) == LZ_ASKED)
				states_set(words, number, 1, LZ_MISSING);
		}
	}
}

void lz_space_drop_saved(struct lz_arena *arena, const struct lz_space *space, struct lz_space *saved)
{
	if (saved->regions_offset != space->regions_offset)
		lz_arena_release(arena, saved->regions_offset, saved->region_capacity * sizeof(struct lz_region));
	memset(saved, 0, sizeof(*saved));
}

int lz_space_save(struct lz_arena *arena, const struct lz_space *space, struct lz_space *saved)
{
	struct lz_space copy = *space;

	if (saved->region_capacity < space->regions || saved->regions_offset == space->regions_offset) {
		struct lz_space old = *saved;
		uint64_t offset = lz_arena_alloc(arena, space->region_capacity * sizeof(struct lz_region));

		if (!offset)
			return -ENOMEM;
		/* In this order: what was released and may be somebody else's is not written to any more. */
		__atomic_store_n(&saved->regions_offset, offset, __ATOMIC_SEQ_CST);
		saved->region_capacity = space->region_capacity;
		lz_space_drop_saved(arena, space, &old);
	}
	copy.regions_offset = saved->regions_offset;
	copy.region_capacity = saved->region_capacity;
	*saved = copy;
	memcpy(regions_of(arena, saved), regions_of(arena, space), space->regions * sizeof(struct lz_region));
	return 0;
}

void lz_space_drop(struct lz_arena *arena, struct lz_space *space)
{
	if (space->table_offset) {
		struct lz_flat_table *table = LZ_AT(arena, struct lz_flat_table, space->table_offset);

		if (!__atomic_sub_fetch(&table->references, 1, __ATOMIC_ACQ_REL))
			lz_arena_release(arena, space->table_offset,
					 sizeof(*table) + table->count * sizeof(struct lz_extent));
	}
	lz_arena_release(arena, space->regions_offset, space->region_capacity * sizeof(struct lz_region));
	lz_arena_release(arena, space->states_offset, state_bytes(space->state_pages));
	memset(space, 0, sizeof(*space));
}

uint32_t lz_space_first_after(struct lz_arena *arena, const struct lz_space *space, uint64_t address)
{
	const struct lz_region *regions = regions_of(arena, space);
	uint32_t low = 0, high = space->regions;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (region_end(&regions[middle]) <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

int64_t lz_space_find(struct lz_arena *arena, const struct lz_space *space, uint64_t address)
{
	uint32_t number = lz_space_first_after(arena, space, address);

	if (number < space->regions && regions_of(arena, space)[number].start <= address)
		return number;
	return -1;
}

const struct lz_region *lz_space_region(struct lz_arena *arena, const struct lz_space *space, uint32_t number)
{
	return number < space->regions ? &regions_of(arena, space)[number] : NULL;
}

/* Make room for more regions; their array may move. */
static int reserve_regions(struct lz_arena *arena, struct lz_space *space, uint32_t more)
{
	uint32_t capacity = space->region_capacity;
	uint64_t offset;

	if (space->regions + more <= capacity)
		return 0;
	while (capacity < space->regions + more)
		capacity *= 2;
	offset = lz_arena_alloc(arena, capacity * sizeof(struct lz_region));
	if (!offset)
		return -ENOMEM;
	memcpy(LZ_AT(arena, struct lz_region, offset), regions_of(arena, space),
	       space->regions * sizeof(struct lz_region));
	lz_arena_release(arena, space->regions_offset, space->region_capacity * sizeof(struct lz_region));
	space->regions_offset = offset;
	space->region_capacity = capacity;
	return 0;
}

/* Cut the region that an address lies inside of in two; there is room for one more. */
static void cut_at(struct lz_arena *arena, struct lz_space *space, uint64_t address)
{
	int64_t number = lz_space_find(arena, space, address);
	struct lz_region *left, *right;
	uint64_t pages;

	if (number < 0)
		return;
	left = &regions_of(arena, space)[number];
	if (left->start == address)
		return;
	right = left + 1;
	memmove(right + 1, right, (space->regions - (uint32_t)number - 1) * sizeof(*right));
	space->regions++;
	pages = (address - left->start) >> LZ_PAGE_SHIFT;
	*right = (struct lz_region){
		.start = address,
		.pages = left->pages - pages,
		.image_start = left->image_start + (pages << LZ_PAGE_SHIFT),
		.state_index = left->state_index + pages,
		.fill_page = left->fill_page > pages ? left->fill_page - pages : 0,
		.extent_hint = left->extent_hint,
		.flags = left->flags,
	};
	left->pages = pages;
	if (left->fill_page > pages)
		left->fill_page = pages;
}

/* Cut at both ends of a range: the regions [*first, *first + count) are then exactly what lies in it. */
static int carve(struct lz_arena *arena, struct lz_space *space, uint64_t start, uint64_t end, uint32_t *first,
		 uint32_t *count)
{
	int result = reserve_regions(arena, space, 2);

	if (result < 0)
		return result;
	cut_at(arena, space, start);
	cut_at(arena, space, end);
	*first = lz_space_first_after(arena, space, start);
	*count = lz_space_first_after(arena, space, end) - *first;
	return 0;
}

static void delete_regions(struct lz_arena *arena, struct lz_space *space, uint32_t first, uint32_t count)
{
	struct lz_region *regions = regions_of(arena, space);

	memmove(&regions[first], &regions[first + count], (space->regions - first - count) * sizeof(*regions));
	space->regions -= count;
}

int lz_space_unmap(struct lz_arena *arena, struct lz_space *space, uint64_t start, uint64_t end)
{
	uint32_t first, count;
	int result;

	assert(start < end);
	result = carve(arena, space, start, end, &first, &count);
	if (result < 0)
		return result;
	delete_regions(arena, space, first, count);
	return 0;
}

static void reverse(struct lz_region *regions, uint32_t count)
{
	for (uint32_t i = 0; i < count / 2; i++) {
		struct lz_region swap = regions[i];

		regions[i] = regions[count - 1 - i];
		regions[count - 1 - i] = swap;
	}
}

int lz_space_remap(struct lz_arena *arena, struct lz_space *space, uint64_t from, uint64_t to, uint64_t length)
{
	uint32_t first, count, place, low, high;
	struct lz_region *regions;
	int result;

	assert(length && (from + length <= to || to + length <= from));
	/* Whatever the table has at the destination was unmapped by the same mremap. */
	result = lz_space_unmap(arena, space, to, to + length);
	if (result < 0)
		return result;
	result = carve(arena, space, from, from + length, &first, &count);
	if (result < 0)
		return result;
	place = lz_space_first_after(arena, space, to);
	regions = regions_of(arena, space);
	for (uint32_t i = first; i < first + count; i++)
		regions[i].start += to - from;
	/* Rotate the moved ones to where they now belong. */
	if (place >= first + count) {
		low = first;
		high = place;
		reverse(&regions[low], count);
		reverse(&regions[low + count], high - low - count);
	} else {
		low = place;
		high = first + count;
		reverse(&regions[low], high - low - count);
		reverse(&regions[high - count], count);
	}
	reverse(&regions[low], high - low);
	return 0;
}

void lz_space_mark(struct lz_arena *arena, struct lz_space *space, uint64_t start, uint64_t pages, enum lz_state state)
{
	const uint64_t end = start + (pages << LZ_PAGE_SHIFT);
	const struct lz_region *regions = regions_of(arena, space);

	for (uint32_t i = lz_space_first_after(arena, space, start); i < space->regions; i++) {
		const struct lz_region *region = &regions[i];
		uint64_t low = region->start > start ? region->start : start;
		uint64_t high = region_end(region) < end ? region_end(region) : end;

		if (low >= high)
			break;
		states_set(states_of(arena, space), region->state_index + ((low - region->start) >> LZ_PAGE_SHIFT),
			   (high - low) >> LZ_PAGE_SHIFT, state);
	}
}

void lz_space_remove(struct lz_arena *arena, struct lz_space *space, uint64_t start, uint64_t end)
{
	lz_space_mark(arena, space, start, (end - start) >> LZ_PAGE_SHIFT, LZ_REMOVED);
}

enum lz_state lz_space_state(struct lz_arena *arena, const struct lz_space *space, uint64_t address)
{
	int64_t number = lz_space_find(arena, space, address);
	const struct lz_region *region;

	if (number < 0)
		return LZ_REMOVED;
	region = &regions_of(arena, space)[number];
	return state_get(states_of(arena, space), region->state_index + ((address - region->start) >> LZ_PAGE_SHIFT));
}

/* Number of the first extent that ends after an image address. */
static uint32_t first_extent_after(const struct lz_flat_table *table, uint64_t address, uint32_t hint)
{
	const struct lz_extent *rows = table->extents;
	uint64_t low = 0, high = table->count;

	/* A fill asks in order: the answer is the hint or its neighbour. */
	for (uint32_t i = hint; i < hint + 2 && i < table->count; i++) {
		uint64_t end = rows[i].start + ((uint64_t)rows[i].pages << LZ_PAGE_SHIFT);
		uint64_t before = i ? rows[i - 1].start + ((uint64_t)rows[i - 1].pages << LZ_PAGE_SHIFT) : 0;

		if (before <= address && address < end)
			return i;
	}
	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (rows[middle].start + ((uint64_t)rows[middle].pages << LZ_PAGE_SHIFT) <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return (uint32_t)low;
}

const struct lz_extent *lz_space_extent(struct lz_arena *arena, const struct lz_space *space, uint64_t image_address,
					uint64_t *gap_end)
{
	const struct lz_flat_table *table = table_of(arena, space);
	uint32_t i = first_extent_after(table, image_address, UINT32_MAX - 2);

	if (i < table->count && table->extents[i].start <= image_address)
		return &table->extents[i];
	*gap_end = i < table->count ? table->extents[i].start : LZ_USER_END;
	return NULL;
}

struct lz_extent *lz_space_rows(struct lz_arena *arena, const struct lz_space *space)
{
	return LZ_AT(arena, struct lz_flat_table, space->table_offset)->extents;
}

bool lz_space_is_alone(struct lz_arena *arena, const struct lz_space *space)
{
	return __atomic_load_n(&LZ_AT(arena, struct lz_flat_table, space->table_offset)->references,
			       __ATOMIC_ACQUIRE) == 1;
}

uint64_t lz_space_state_run(struct lz_arena *arena, const struct lz_space *space, const struct lz_region *region,
			    uint64_t page, uint64_t pages, bool missing)
{
	return states_run(states_of(arena, space), region->state_index + page, pages, missing);
}

int lz_space_next_missing(struct lz_arena *arena, struct lz_space *space, uint32_t number, uint64_t page,
			  uint64_t limit_page, uint64_t max_pages, struct lz_run *run)
{
	struct lz_region *region = &regions_of(arena, space)[number];
	const struct lz_flat_table *table = table_of(arena, space);
	const uint64_t *states = states_of(arena, space);
	uint32_t i;

	assert(max_pages > 0);
	if (limit_page > region->pages)
		limit_page = region->pages;
	if (page >= limit_page)
		return 0;
	i = first_extent_after(table, region->image_start + (page << LZ_PAGE_SHIFT), region->extent_hint);
	for (; i < table->count; i++) {
		const struct lz_extent *row = &table->extents[i];
		uint64_t low, high;

		region->extent_hint = i;
		if (row->start >= region->image_start + (limit_page << LZ_PAGE_SHIFT))
			return 0;
		if (row->kind == LZ_KIND_ZERO)
			continue;
		low = row->start > region->image_start ? (row->start - region->image_start) >> LZ_PAGE_SHIFT : 0;
		if (low < page)
			low = page;
		high = ((row->start - region->image_start) >> LZ_PAGE_SHIFT) + row->pages;
		if (row->start < region->image_start)
			high = row->pages - ((region->image_start - row->start) >> LZ_PAGE_SHIFT);
		if (high > limit_page)
			high = limit_page;
		low += states_run(states, region->state_index + low, high - low, false);
		if (low >= high)
			continue;
		if (high - low > max_pages)
			high = low + max_pages;
		*run = (struct lz_run){
			.start = region->start + (low << LZ_PAGE_SHIFT),
			.pages = states_run(states, region->state_index + low, high - low, true),
			.page = low,
			.source = row->source,
			.kind = row->kind,
		};
		if (row->kind == LZ_KIND_DUMPED || row->kind == LZ_KIND_REMOTE)
			run->offset = row->offset + (region->image_start + (low << LZ_PAGE_SHIFT) - row->start);
		return 1;
	}
	return 0;
}

uint64_t lz_space_count_missing(struct lz_arena *arena, struct lz_space *space, uint64_t start, uint64_t end)
{
	uint64_t total = 0;

	for (uint32_t i = lz_space_first_after(arena, space, start); i < space->regions; i++) {
		const struct lz_region *region = &regions_of(arena, space)[i];
		struct lz_run run;
		uint64_t page, limit;

		if (region->start >= end)
			break;
		page = start > region->start ? (start - region->start) >> LZ_PAGE_SHIFT : 0;
		limit = end < region_end(region) ? (end - region->start) >> LZ_PAGE_SHIFT : region->pages;
		if (page < region->fill_page)
			page = region->fill_page; /* nothing is missing before it */
		while (lz_space_next_missing(arena, space, i, page, limit, UINT64_MAX, &run)) {
			total += run.pages;
			page = run.page + run.pages;
		}
	}
	return total;
}

bool lz_space_done_block(struct lz_arena *arena, const struct lz_space *space, uint32_t number, uint32_t *first,
			 uint32_t *count)
{
	const struct lz_region *regions = regions_of(arena, space);
	uint32_t low = number, high = number + 1;

	if (!(regions[number].flags & LZ_REGION_DONE))
		return false;
	while (low > 0 && region_end(&regions[low - 1]) == regions[low].start) {
		if (!(regions[low - 1].flags & LZ_REGION_DONE))
			return false;
		low--;
	}
	while (high < space->regions && region_end(&regions[high - 1]) == regions[high].start) {
		if (!(regions[high].flags & LZ_REGION_DONE))
			return false;
		high++;
	}
	*first = low;
	*count = high - low;
	return true;
}
