/* SPDX-License-Identifier: MIT */
/*
 * Pagemap images: decode, check, and flatten a chain of them into one table of extents.
 *
 * The file is two magics, then records of a u32 length and a protobuf message: first the head {1: pages_id}, then
 * entries, all integers little-endian. An entry's fields have been used in two ways over the years:
 *
 *   field        booleans          flags, 24-byte era       flags, 32-byte era
 *   1 uint64     address           address                  address
 *   2 uint32     pages             pages                    0
 *   3 bool       in parent         in parent (old writers)  -
 *   4 varint     zero (bool)       1 parent 2 lazy 4 present, as before
 *   5 varint     lazy (bool)       -                        pages (uint64)
 *
 * Field 4 = 1 alone is "zeros" in one and "in the parent" in the other, so no entry is given a meaning before the
 * whole chain has been read: the decoder keeps what was written and notes what it has seen; the caller decides; the
 * flattener then reads every entry in that dialect. How many pages an entry has is the same in both (field 2, or
 * field 5 where field 2 is 0), so that order, overlap and bounds are checked at once.
 *
 * An unknown field is refused, not skipped: later versions say there that pages are compressed.
 *
 * Decoder and flattener are one file because they share the packed form of an entry, which nobody else knows.
 */
#include "lz.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAGIC_COMMON 0x54564319U
#define MAGIC_PAGEMAP 0x56084025U

/* A record of this format has at most some forty bytes; what is longer than this is not one. */
#define RECORD_MAX 4096U
#define BUFFER_BYTES (256U << 10)

/* Low bits of lz_entry.word. */
#define WORD_4_SHIFT 0 /* field 4, 0 to 7 */
#define WORD_4_MASK 7U
#define WORD_HAS_4 (1U << 3)
#define WORD_PARENT (1U << 4) /* field 3 is true */
#define WORD_HAS_5 (1U << 5)
#define WORD_5_TRUE (1U << 6)  /* field 5 is 1 beside a field 2 that is not 0: lazy, if booleans */
#define WORD_2_ZERO (1U << 7)  /* the count came from field 5 */
#define WORD_5_COUNT (1U << 8) /* field 5 is above 1 and equals field 2 */
#define WORD_BITS (LZ_PAGE_SIZE - 1)

#define PE_PARENT 1U
#define PE_LAZY 2U
#define PE_PRESENT 4U

struct reader {
	int fd;
	uint64_t base; /* file offset of bytes[0] */
	size_t at;     /* next byte to look at */
	size_t filled;
	uint8_t *bytes;
	struct lz_pagemap_error *error;
};

struct fields {
	uint64_t value[6]; /* by field number; [0] unused */
	uint32_t present;  /* bit n: field n */
};

static int bad(struct lz_pagemap_error *error, int code, uint64_t offset, uint64_t first, uint64_t second)
{
	error->code = code;
	error->offset = offset;
	error->has_offset = 1;
	error->address = 0;
	error->has_address = 0;
	error->detail[0] = first;
	error->detail[1] = second;
	return -EBADMSG;
}

static int bad_entry(struct lz_pagemap_error *error, int code, uint64_t offset, uint64_t address, uint64_t first,
		     uint64_t second)
{
	bad(error, code, offset, first, second);
	error->address = address;
	error->has_address = 1;
	return -EBADMSG;
}

static uint32_t little32(const uint8_t *bytes)
{
	return (uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

/* Make `need` bytes available from r->at on; return how many are (fewer only at the end of the file), or -errno. */
static ssize_t fill(struct reader *r, size_t need)
{
	assert(need <= BUFFER_BYTES);
	if (r->filled - r->at >= need)
		return (ssize_t)(r->filled - r->at);
	memmove(r->bytes, r->bytes + r->at, r->filled - r->at);
	r->base += r->at;
	r->filled -= r->at;
	r->at = 0;
	while (r->filled < need) {
		ssize_t got =
			pread(r->fd, r->bytes + r->filled, BUFFER_BYTES - r->filled, (off_t)(r->base + r->filled));
		if (got < 0) {
			if (errno == EINTR)
				continue;
			return -errno;
		}
		if (got == 0)
			break;
		r->filled += (size_t)got;
	}
	return (ssize_t)r->filled;
}

static uint64_t position(const struct reader *r)
{
	return r->base + r->at;
}

static int reader_start(struct reader *r, int fd, struct lz_pagemap_error *error)
{
	static const uint32_t magics[2] = { MAGIC_COMMON, MAGIC_PAGEMAP };

	*r = (struct reader){ .fd = fd, .error = error };
	r->bytes = malloc(BUFFER_BYTES);
	if (!r->bytes)
		return -ENOMEM;
	for (size_t i = 0; i < 2; i++) {
		ssize_t there = fill(r, 4);
		if (there < 0)
			return (int)there;
		if (there < 4)
			return bad(error, LZ_BAD_TRUNCATED, position(r), 4, (uint64_t)there);
		uint32_t magic = little32(r->bytes + r->at);
		if (magic != magics[i])
			return bad(error, LZ_BAD_MAGIC, position(r), magic, magics[i]);
		r->at += 4;
	}
	return 0;
}

/*
 * Find the next record: 1 with its file offset and its body (which stays until the next call), 0 at the end of the
 * file, or -errno.
 */
static int next_record(struct reader *r, uint64_t *offset, const uint8_t **body, uint32_t *length)
{
	ssize_t there = fill(r, 4);

	if (there <= 0)
		return (int)there;
	*offset = position(r);
	if (there < 4)
		return bad(r->error, LZ_BAD_TRUNCATED, *offset, 4, (uint64_t)there);
	*length = little32(r->bytes + r->at);
	if (*length > RECORD_MAX)
		return bad(r->error, LZ_BAD_LENGTH, *offset, *length, RECORD_MAX);
	there = fill(r, 4 + (size_t)*length);
	if (there < 0)
		return (int)there;
	if ((size_t)there < 4 + (size_t)*length)
		return bad(r->error, LZ_BAD_TRUNCATED, *offset, 4 + (uint64_t)*length, (uint64_t)there);
	*body = r->bytes + r->at + 4;
	r->at += 4 + (size_t)*length;
	return 1;
}

/* Decode one varint; return how many bytes it takes, or 0 if it has no end or does not fit 64 bits. */
static inline size_t varint(const uint8_t *at, const uint8_t *end, uint64_t *value)
{
	uint64_t result = 0;

	for (unsigned int i = 0; i < 10 && at + i < end; i++) {
		uint8_t byte = at[i];
		if (i == 9 && byte > 1)
			return 0;
		result |= (uint64_t)(byte & 0x7f) << (7 * i);
		if (!(byte & 0x80)) {
			*value = result;
			return i + 1;
		}
	}
	return 0;
}

/* Decode a message that has only varint fields, numbered 1 to `highest`; as in protobuf, the last of a kind counts. */
static int decode(const uint8_t *body, uint32_t length, uint64_t body_offset, unsigned int highest,
		  struct fields *fields, struct lz_pagemap_error *error)
{
	const uint8_t *at = body, *end = body + length;

	fields->present = 0;
	while (at < end) {
		uint64_t here = body_offset + (uint64_t)(at - body);
		uint64_t tag, value;
		size_t took = varint(at, end, &tag);
		if (!took || tag > UINT32_MAX || tag >> 3 == 0)
			return bad(error, LZ_BAD_VARINT, here, 0, 0);
		if (tag >> 3 > highest)
			return bad(error, LZ_BAD_UNKNOWN_FIELD, here, tag >> 3, tag & 7);
		if (tag & 7)
			return bad(error, LZ_BAD_WIRE_TYPE, here, tag >> 3, tag & 7);
		at += took;
		took = varint(at, end, &value);
		if (!took)
			return bad(error, LZ_BAD_VARINT, here, 0, 0);
		at += took;
		fields->value[tag >> 3] = value;
		fields->present |= 1U << (tag >> 3);
	}
	return 0;
}

static bool has(const struct fields *fields, unsigned int number)
{
	return fields->present >> number & 1;
}

/* Check an entry on its own, whatever its dialect, and pack it. `seen` is what this entry adds. */
static int pack_entry(const struct fields *f, uint64_t offset, struct lz_entry *entry, uint32_t *seen,
		      struct lz_pagemap_error *error)
{
	uint64_t word, pages;

	for (unsigned int number = 1; number <= 2; number++)
		if (!has(f, number))
			return bad(error, LZ_BAD_MISSING_FIELD, offset, number, 0);
	word = f->value[1];
	pages = f->value[2];
	if (word & WORD_BITS)
		return bad_entry(error, LZ_BAD_UNALIGNED, offset, word, 0, 0);
	if (pages > UINT32_MAX)
		return bad_entry(error, LZ_BAD_FIELD_RANGE, offset, word, 2, pages);
	*seen = 0;
	if (has(f, 3) && f->value[3]) {
		word |= WORD_PARENT;
		*seen |= LZ_SEEN_PARENT;
	}
	if (has(f, 4)) {
		if (f->value[4] > WORD_4_MASK)
			return bad_entry(error, LZ_BAD_FLAG_BITS, offset, f->value[1], f->value[4], 0);
		word |= WORD_HAS_4 | f->value[4] << WORD_4_SHIFT;
		*seen |= LZ_SEEN_FIELD_4;
		if (f->value[4] > 1)
			*seen |= LZ_SEEN_FLAGS;
		if (f->value[4] & PE_PARENT)
			*seen |= LZ_SEEN_PARENT;
	}
	if (has(f, 5)) {
		uint64_t five = f->value[5];
		word |= WORD_HAS_5;
		*seen |= LZ_SEEN_FIELD_5;
		if (pages == 0) {
			pages = five;
			word |= WORD_2_ZERO;
			*seen |= LZ_SEEN_FLAGS;
		} else if (five > 1) {
			if (five != pages)
				return bad_entry(error, LZ_BAD_COUNTS, offset, f->value[1], pages, five);
			word |= WORD_5_COUNT;
			*seen |= LZ_SEEN_FLAGS;
		} else {
			if (five)
				word |= WORD_5_TRUE;
			*seen |= LZ_SEEN_LAZY_BOOL;
		}
	}
	if (!(word & (WORD_PARENT | WORD_HAS_4 | WORD_5_TRUE | WORD_2_ZERO | WORD_5_COUNT)))
		*seen |= LZ_SEEN_BARE;
	if (pages == 0)
		return bad_entry(error, LZ_BAD_NO_PAGES, offset, f->value[1], 0, 0);
	if (f->value[1] >= LZ_USER_END || pages > (LZ_USER_END - f->value[1]) >> LZ_PAGE_SHIFT)
		return bad_entry(error, LZ_BAD_USER_SPACE, offset, f->value[1], pages, LZ_USER_END);
	entry->word = word;
	entry->pages = pages;
	return 0;
}

static uint64_t entry_start(const struct lz_entry *entry)
{
	return entry->word & ~(uint64_t)WORD_BITS;
}

static uint64_t entry_end(const struct lz_entry *entry)
{
	return entry_start(entry) + (entry->pages << LZ_PAGE_SHIFT);
}

static int read_head(struct reader *r, uint32_t *pages_id)
{
	const uint8_t *body;
	uint64_t offset;
	uint32_t length;
	struct fields fields;
	int got = next_record(r, &offset, &body, &length);

	if (got < 0)
		return got;
	if (got == 0)
		return bad(r->error, LZ_BAD_NO_HEAD, position(r), 0, 0);
	got = decode(body, length, offset + 4, 1, &fields, r->error);
	if (got < 0)
		return got;
	if (!has(&fields, 1))
		return bad(r->error, LZ_BAD_MISSING_FIELD, offset, 1, 0);
	if (fields.value[1] > UINT32_MAX)
		return bad(r->error, LZ_BAD_FIELD_RANGE, offset, 1, fields.value[1]);
	*pages_id = (uint32_t)fields.value[1];
	return 0;
}

/* Read the next entry: 1, 0 at the end of the file, or -errno. */
static int read_entry(struct reader *r, uint64_t *offset, struct lz_entry *entry, uint32_t *seen)
{
	const uint8_t *body;
	uint32_t length;
	struct fields fields;
	int got = next_record(r, offset, &body, &length);

	if (got <= 0)
		return got;
	got = decode(body, length, *offset + 4, 5, &fields, r->error);
	if (got == 0)
		got = pack_entry(&fields, *offset, entry, seen, r->error);
	return got < 0 ? got : 1;
}

static int read_entries(struct reader *r, struct lz_pagemap *out)
{
	uint64_t capacity = 0, last_start = 0, last_end = 0;

	for (;;) {
		struct lz_entry entry;
		uint64_t offset;
		uint32_t seen;
		int got = read_entry(r, &offset, &entry, &seen);
		if (got <= 0)
			return got;
		uint64_t start = entry_start(&entry);
		if (start < last_end) {
			int code = start < last_start ? LZ_BAD_UNSORTED : LZ_BAD_OVERLAP;
			return bad_entry(r->error, code, offset, start, last_start, last_end);
		}
		last_start = start;
		last_end = entry_end(&entry);
		if (seen & LZ_SEEN_FLAGS && !(out->seen & LZ_SEEN_FLAGS)) {
			out->flags_offset = offset;
			out->flags_address = start;
		}
		if (seen & LZ_SEEN_BARE && !(out->seen & LZ_SEEN_BARE)) {
			out->bare_offset = offset;
			out->bare_address = start;
		}
		out->seen |= seen;
		if (out->count == capacity) {
			capacity = capacity ? capacity * 2 : 256;
			void *grown = realloc(out->entries, capacity * sizeof(entry));
			if (!grown)
				return -ENOMEM;
			out->entries = grown;
		}
		out->entries[out->count++] = entry;
	}
}

int lz_pagemap_read(int fd, struct lz_pagemap *out, struct lz_pagemap_error *error)
{
	struct reader reader;
	int result;

	assert(out && error);
	memset(out, 0, sizeof(*out));
	memset(error, 0, sizeof(*error));
	result = reader_start(&reader, fd, error);
	if (result == 0)
		result = read_head(&reader, &out->pages_id);
	if (result == 0)
		result = read_entries(&reader, out);
	free(reader.bytes);
	if (result < 0)
		lz_pagemap_free(out);
	return result;
}

void lz_pagemap_free(struct lz_pagemap *pagemap)
{
	free(pagemap->entries);
	memset(pagemap, 0, sizeof(*pagemap));
}

int lz_pagemap_locate(int fd, uint64_t address, uint64_t *offset)
{
	struct lz_pagemap_error error;
	struct reader reader;
	struct lz_entry entry;
	uint32_t ignored;
	int result;

	result = reader_start(&reader, fd, &error);
	if (result == 0)
		result = read_head(&reader, &ignored);
	while (result >= 0) {
		result = read_entry(&reader, offset, &entry, &ignored);
		if (result == 0)
			result = -ENOENT;
		else if (result > 0 && entry_start(&entry) <= address && address < entry_end(&entry))
			break;
	}
	free(reader.bytes);
	return result < 0 ? result : 0;
}

/* What an entry says in the dialect of its chain. */
struct meaning {
	uint8_t kind; /* enum lz_kind, or 0: in the parent */
	uint8_t lazy;
};

static int read_flags(const struct lz_entry *entry, struct meaning *meaning)
{
	uint32_t bits = (uint32_t)(entry->word & WORD_BITS);
	uint32_t flags = bits >> WORD_4_SHIFT & WORD_4_MASK;

	if (bits & WORD_5_TRUE && entry->pages != 1)
		return -EINVAL; /* counts that differ: field 5 says one page */
	if (bits & WORD_HAS_5 && !(bits & (WORD_2_ZERO | WORD_5_COUNT | WORD_5_TRUE)))
		return -EINVAL; /* the same: field 5 says none */
	if (bits & WORD_PARENT)
		flags |= PE_PARENT;
	else if (!(bits & WORD_HAS_4))
		flags = PE_PRESENT;
	if ((flags & PE_PARENT) && (flags & PE_PRESENT))
		return -EINVAL;
	meaning->lazy = (flags & PE_LAZY) != 0;
	if (flags & PE_PRESENT)
		meaning->kind = LZ_KIND_DUMPED;
	else if (flags & PE_PARENT)
		meaning->kind = 0;
	else
		meaning->kind = flags & PE_LAZY ? LZ_KIND_REMOTE : LZ_KIND_ZERO;
	return 0;
}

static int read_booleans(const struct lz_entry *entry, struct meaning *meaning)
{
	uint32_t bits = (uint32_t)(entry->word & WORD_BITS);
	bool parent = bits & WORD_PARENT, zero = bits >> WORD_4_SHIFT & 1, remote = bits & WORD_5_TRUE;

	if (parent + zero + remote > 1)
		return -EINVAL;
	meaning->lazy = 1;
	meaning->kind = parent ? 0 : zero ? LZ_KIND_ZERO : remote ? LZ_KIND_REMOTE : LZ_KIND_DUMPED;
	return 0;
}

static int read_meaning(const struct lz_entry *entry, int dialect, struct meaning *meaning,
			struct lz_pagemap_error *error)
{
	uint32_t bits = (uint32_t)(entry->word & WORD_BITS);
	uint32_t four = bits >> WORD_4_SHIFT & WORD_4_MASK;
	uint64_t start = entry_start(entry);
	int result;

	if (dialect == LZ_DIALECT_BOOLEANS) {
		if (four > 1)
			result = bad_entry(error, LZ_BAD_NOT_BOOLEAN, 0, start, 4, four);
		else if (bits & WORD_2_ZERO)
			result = bad_entry(error, LZ_BAD_NOT_BOOLEAN, 0, start, 2, 0);
		else if (bits & WORD_5_COUNT)
			result = bad_entry(error, LZ_BAD_NOT_BOOLEAN, 0, start, 5, entry->pages);
		else
			result = read_booleans(entry, meaning);
	} else {
		result = read_flags(entry, meaning);
	}
	if (result == -EINVAL) {
		uint64_t three = bits & WORD_PARENT ? 1 : 0, five = bits & WORD_5_TRUE ? 1 : 0;
		result = bad_entry(error, LZ_BAD_COMBINATION, 0, start, three | (uint64_t)four << 1 | five << 4,
				   (uint64_t)dialect);
	}
	if (result < 0)
		error->has_offset = 0;
	return result;
}

static bool continues(const struct lz_extent *last, const struct lz_extent *next)
{
	uint64_t bytes = (uint64_t)last->pages << LZ_PAGE_SHIFT;

	if (last->start + bytes != next->start || last->kind != next->kind || last->lazy != next->lazy ||
	    last->source != next->source || (uint64_t)last->pages + next->pages > UINT32_MAX)
		return false;
	return next->offset == (next->kind == LZ_KIND_DUMPED ? last->offset + bytes : last->offset);
}

/* Append a run of any length, joined to the row before where it continues it, split where a row cannot hold it. */
static int append(struct lz_table *table, struct lz_extent run, uint64_t pages)
{
	while (pages) {
		run.pages = pages > UINT32_MAX ? UINT32_MAX : (uint32_t)pages;
		pages -= run.pages;
		if (table->count && continues(&table->rows[table->count - 1], &run)) {
			table->rows[table->count - 1].pages += run.pages;
		} else {
			if (table->count == table->capacity) {
				uint64_t capacity = table->capacity ? table->capacity * 2 : 256;
				void *grown = realloc(table->rows, capacity * sizeof(run));
				if (!grown)
					return -ENOMEM;
				table->rows = grown;
				table->capacity = capacity;
			}
			table->rows[table->count++] = run;
		}
		uint64_t bytes = (uint64_t)run.pages << LZ_PAGE_SHIFT;
		run.start += bytes;
		if (run.kind == LZ_KIND_DUMPED)
			run.offset += bytes;
	}
	return 0;
}

static uint64_t row_end(const struct lz_extent *row)
{
	return row->start + ((uint64_t)row->pages << LZ_PAGE_SHIFT);
}

/* Resolve the parent hole [start, end) against the ancestors' rows from *row on; *row moves to the last one used. */
static int append_from_parent(struct lz_table *out, const struct lz_table *parent, uint64_t *row, uint64_t start,
			      uint64_t end, uint8_t lazy, uint32_t level)
{
	while (start < end) {
		while (*row < parent->count && row_end(&parent->rows[*row]) <= start)
			(*row)++;
		struct lz_extent run = { .start = start, .offset = level, .kind = LZ_KIND_BROKEN };
		uint64_t stop = end;
		if (*row < parent->count) {
			const struct lz_extent *below = &parent->rows[*row];
			if (below->start <= start) {
				run = *below;
				run.start = start;
				if (run.kind == LZ_KIND_DUMPED)
					run.offset += start - below->start;
				if (row_end(below) < end)
					stop = row_end(below);
			} else if (below->start < end) {
				stop = below->start;
			}
		}
		run.lazy = lazy;
		int result = append(out, run, (stop - start) >> LZ_PAGE_SHIFT);
		if (result < 0)
			return result;
		start = stop;
	}
	return 0;
}

static int push(struct lz_table *out, const struct lz_table *parent, const struct lz_pagemap *pagemap, uint32_t level,
		int dialect, uint64_t pages_image_bytes, struct lz_pagemap_error *error)
{
	uint64_t row = 0, offset = 0;

	for (uint64_t i = 0; i < pagemap->count; i++) {
		const struct lz_entry *entry = &pagemap->entries[i];
		struct meaning meaning;
		uint64_t start = entry_start(entry), bytes = entry->pages << LZ_PAGE_SHIFT;
		int result = read_meaning(entry, dialect, &meaning, error);
		if (result < 0)
			return result;
		if (meaning.kind == 0) {
			result = append_from_parent(out, parent, &row, start, start + bytes, meaning.lazy, level);
		} else {
			struct lz_extent run = { .start = start, .kind = meaning.kind, .lazy = meaning.lazy };
			if (meaning.kind == LZ_KIND_DUMPED) {
				/* Entries are disjoint, so that the offsets stay below the size of user space. */
				if (offset + bytes > pages_image_bytes) {
					uint64_t fit = pages_image_bytes > offset ? pages_image_bytes - offset : 0;
					bad_entry(error, LZ_BAD_PAGES_SHORT, 0, start + (fit & ~(uint64_t)WORD_BITS),
						  offset, entry->pages);
					error->has_offset = 0;
					return -EBADMSG;
				}
				run.offset = offset;
				run.source = (uint16_t)level;
				offset += bytes;
			}
			result = append(out, run, entry->pages);
		}
		if (result < 0)
			return result;
	}
	out->image_bytes = offset;
	return 0;
}

int lz_table_push(struct lz_table *table, const struct lz_pagemap *pagemap, uint32_t level, int dialect,
		  uint64_t pages_image_bytes, struct lz_pagemap_error *error)
{
	struct lz_table out = { 0 };
	int result;

	assert(level <= UINT16_MAX);
	assert(dialect == LZ_DIALECT_BOOLEANS || dialect == LZ_DIALECT_FLAGS);
	memset(error, 0, sizeof(*error));
	result = push(&out, table, pagemap, level, dialect, pages_image_bytes, error);
	if (result < 0) {
		lz_table_free(&out);
		return result;
	}
	lz_table_free(table);
	*table = out;
	return 0;
}

void lz_table_used(const struct lz_table *table, uint8_t *used, uint32_t levels)
{
	for (uint64_t i = 0; i < table->count; i++)
		if (table->rows[i].kind == LZ_KIND_DUMPED) {
			assert(table->rows[i].source < levels);
			used[table->rows[i].source] = 1;
		}
}

void lz_table_finish(struct lz_table *table, const uint16_t *map, uint32_t levels)
{
	for (uint64_t i = 0; i < table->count; i++)
		if (table->rows[i].kind == LZ_KIND_DUMPED) {
			assert(table->rows[i].source < levels);
			table->rows[i].source = map[table->rows[i].source];
		}
	if (table->count && table->count < table->capacity) {
		void *smaller = realloc(table->rows, table->count * sizeof(*table->rows));
		if (smaller) {
			table->rows = smaller;
			table->capacity = table->count;
		}
	}
	(void)levels;
}

void lz_table_pages(const struct lz_table *table, uint64_t pages[5])
{
	for (uint64_t i = 0; i < table->count; i++)
		pages[table->rows[i].kind] += table->rows[i].pages;
}

uint64_t lz_table_find_kind(const struct lz_table *table, uint64_t from, int kind)
{
	while (from < table->count && table->rows[from].kind != kind)
		from++;
	return from;
}

void lz_table_free(struct lz_table *table)
{
	free(table->rows);
	memset(table, 0, sizeof(*table));
}

void lz_rows_free(struct lz_extent *rows)
{
	free(rows);
}
