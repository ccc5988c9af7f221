/* SPDX-License-Identifier: MIT */
/*
 * cbits/pagemap.c under the sanitizers: records that straddle the reader's buffer, every truncation, single-byte
 * damage everywhere, random bytes, and the flattener against an array of pages.
 */
#undef NDEBUG
#define _GNU_SOURCE 1
#include "lz.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BASE 0x7f0000000000ULL
#define MODEL_PAGES 64
#define LEVELS 4

struct image {
	uint8_t *bytes;
	size_t length;
	size_t capacity;
};

static uint64_t random_state = 0x243f6a8885a308d3ULL;

static uint32_t any(uint32_t below)
{
	random_state = random_state * 6364136223846793005ULL + 1442695040888963407ULL;
	return (uint32_t)(random_state >> 33) % below;
}

static void put(struct image *image, const void *bytes, size_t length)
{
	if (image->length + length > image->capacity) {
		image->capacity = (image->length + length) * 2;
		image->bytes = realloc(image->bytes, image->capacity);
		assert(image->bytes);
	}
	memcpy(image->bytes + image->length, bytes, length);
	image->length += length;
}

static size_t put_varint(uint8_t *at, uint64_t value)
{
	size_t length = 0;

	for (; value > 0x7f; value >>= 7)
		at[length++] = (uint8_t)(value | 0x80);
	at[length++] = (uint8_t)value;
	return length;
}

/* Start an image with its magics and the head of pages image 7. */
static void put_start(struct image *image)
{
	static const uint8_t start[] = { 0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56, 2, 0, 0, 0, 0x08, 7 };

	image->length = 0;
	put(image, start, sizeof(start));
}

static void put_entry(struct image *image, uint64_t address, uint64_t pages, uint64_t flags)
{
	uint8_t body[64];
	size_t length = 0;
	uint32_t prefix;

	body[length++] = 1 << 3;
	length += put_varint(body + length, address);
	body[length++] = 2 << 3;
	length += put_varint(body + length, pages);
	body[length++] = 4 << 3;
	length += put_varint(body + length, flags);
	prefix = (uint32_t)length;
	put(image, &prefix, 4);
	put(image, body, length);
}

static int read_bytes(const uint8_t *bytes, size_t length, struct lz_pagemap *out, struct lz_pagemap_error *error)
{
	int fd = memfd_create("pagemap", MFD_CLOEXEC), result;

	assert(fd >= 0);
	assert(write(fd, bytes, length) == (ssize_t)length);
	result = lz_pagemap_read(fd, out, error);
	close(fd);
	return result;
}

static void test_records_across_the_buffer(void)
{
	struct image image = { 0 };
	struct lz_pagemap pagemap;
	struct lz_pagemap_error error;
	struct lz_table table = { 0 };
	const uint64_t count = 100000;

	put_start(&image);
	for (uint64_t i = 0; i < count; i++)
		put_entry(&image, BASE + i * 2 * LZ_PAGE_SIZE, 1, i % 2 ? 4 : 6);
	assert(read_bytes(image.bytes, image.length, &pagemap, &error) == 0);
	assert(pagemap.count == count && pagemap.pages_id == 7);
	assert(pagemap.seen == (LZ_SEEN_FIELD_4 | LZ_SEEN_FLAGS));
	assert(pagemap.flags_offset == 14 && pagemap.flags_address == BASE);
	assert(lz_table_push(&table, &pagemap, 3, LZ_DIALECT_FLAGS, count * LZ_PAGE_SIZE, &error) == 0);
	assert(table.count == count && table.image_bytes == count * LZ_PAGE_SIZE);
	for (uint64_t i = 0; i < count; i++) {
		const struct lz_extent *row = &table.rows[i];
		assert(row->start == BASE + i * 2 * LZ_PAGE_SIZE && row->offset == i * LZ_PAGE_SIZE);
		assert(row->pages == 1 && row->source == 3 && row->kind == LZ_KIND_DUMPED);
		assert(row->lazy == (i % 2 ? 0 : 1));
	}
	assert(lz_table_push(&table, &pagemap, 2, LZ_DIALECT_FLAGS, count * LZ_PAGE_SIZE - 1, &error) == -EBADMSG);
	assert(error.code == LZ_BAD_PAGES_SHORT && error.address == BASE + (count - 1) * 2 * LZ_PAGE_SIZE);
	assert(table.count == count && table.rows[0].source == 3);
	lz_table_free(&table);
	lz_pagemap_free(&pagemap);
	free(image.bytes);
}

/* Damage of any kind either still reads, with its rules kept, or says where; nothing is leaked (ASan looks). */
static void read_damaged(const uint8_t *bytes, size_t length)
{
	struct lz_pagemap pagemap;
	struct lz_pagemap_error error;
	int result = read_bytes(bytes, length, &pagemap, &error);

	if (result < 0) {
		assert(result == -EBADMSG && error.code != LZ_BAD_NOTHING);
		assert(error.has_offset && error.offset <= length);
		assert(!pagemap.entries && pagemap.count == 0);
		return;
	}
	for (int dialect = LZ_DIALECT_BOOLEANS; dialect <= LZ_DIALECT_FLAGS; dialect++) {
		struct lz_table table = { 0 };
		uint64_t end = 0;
		for (uint32_t level = 2; level-- > 0;)
			if (lz_table_push(&table, &pagemap, level, dialect, UINT64_MAX, &error) < 0)
				assert(error.has_address && !error.has_offset);
		for (uint64_t i = 0; i < table.count; i++) {
			assert(table.rows[i].start >= end && table.rows[i].pages > 0);
			end = table.rows[i].start + ((uint64_t)table.rows[i].pages << LZ_PAGE_SHIFT);
			assert(end <= LZ_USER_END);
		}
		lz_table_free(&table);
	}
	lz_pagemap_free(&pagemap);
}

static void test_damage(void)
{
	struct image image = { 0 };

	put_start(&image);
	put_entry(&image, BASE, 3, 6);
	put_entry(&image, BASE + 3 * LZ_PAGE_SIZE, 2, 3);
	put_entry(&image, BASE + 9 * LZ_PAGE_SIZE, 1000, 0);
	for (size_t length = 0; length <= image.length; length++)
		read_damaged(image.bytes, length);
	for (size_t at = 0; at < image.length; at++) {
		uint8_t kept = image.bytes[at];
		for (unsigned int value = 0; value < 256; value++) {
			image.bytes[at] = (uint8_t)value;
			read_damaged(image.bytes, image.length);
		}
		image.bytes[at] = kept;
	}
	for (int round = 0; round < 3000; round++) {
		uint8_t noise[80];
		size_t length = any(sizeof(noise));
		for (size_t i = 0; i < length; i++)
			noise[i] = (uint8_t)any(256);
		put_start(&image);
		put(&image, noise, length);
		read_damaged(image.bytes, image.length);
	}
	free(image.bytes);
}

struct page {
	uint8_t kind; /* 0: no entry */
	uint8_t lazy;
	uint16_t source;
	uint64_t offset;
};

/* Write a random image and say, page by page, what the chain with it on top is. */
static void random_level(struct image *image, struct page *model, uint32_t level)
{
	static const uint64_t flags[] = { 4, 6, 0, 2, 1, 3 };
	struct page below[MODEL_PAGES];
	uint64_t offset = 0;

	memcpy(below, model, sizeof(below));
	memset(model, 0, sizeof(below));
	put_start(image);
	for (uint32_t at = any(4); at < MODEL_PAGES; at += any(3)) {
		uint64_t chosen = flags[any(6)];
		uint32_t pages = 1 + any(9);
		if (pages > MODEL_PAGES - at)
			pages = MODEL_PAGES - at;
		put_entry(image, BASE + (at << LZ_PAGE_SHIFT), pages, chosen);
		for (; pages; pages--, at++) {
			struct page *page = &model[at];
			if (chosen & 4) {
				*page = (struct page){ LZ_KIND_DUMPED, 0, (uint16_t)level, offset };
				offset += LZ_PAGE_SIZE;
			} else if (chosen & 1) {
				*page = below[at];
				if (!page->kind)
					*page = (struct page){ LZ_KIND_BROKEN, 0, 0, level };
			} else {
				page->kind = chosen & 2 ? LZ_KIND_REMOTE : LZ_KIND_ZERO;
			}
			page->lazy = chosen & 2 ? 1 : 0;
		}
	}
}

static void test_flattening(void)
{
	struct image image = { 0 };

	for (int round = 0; round < 3000; round++) {
		struct page model[MODEL_PAGES] = { 0 };
		struct lz_table table = { 0 };
		struct lz_pagemap_error error;
		uint64_t counted[5] = { 0 }, expected[5] = { 0 };
		uint64_t next = BASE;

		for (uint32_t level = LEVELS; level-- > 0;) {
			struct lz_pagemap pagemap;
			random_level(&image, model, level);
			assert(read_bytes(image.bytes, image.length, &pagemap, &error) == 0);
			assert(lz_table_push(&table, &pagemap, level, LZ_DIALECT_FLAGS, UINT64_MAX, &error) == 0);
			lz_pagemap_free(&pagemap);
		}
		for (uint64_t i = 0; i < table.count; i++) {
			const struct lz_extent *row = &table.rows[i];
			for (uint32_t page = 0; page < row->pages; page++) {
				uint64_t address = row->start + ((uint64_t)page << LZ_PAGE_SHIFT);
				const struct page *says = &model[(address - BASE) >> LZ_PAGE_SHIFT];
				uint64_t step = row->kind == LZ_KIND_DUMPED ? (uint64_t)page << LZ_PAGE_SHIFT : 0;
				for (; next < address; next += LZ_PAGE_SIZE)
					assert(!model[(next - BASE) >> LZ_PAGE_SHIFT].kind);
				assert(row->kind == says->kind && row->lazy == says->lazy);
				assert(row->source == says->source && row->offset + step == says->offset);
				next = address + LZ_PAGE_SIZE;
			}
		}
		for (; next < BASE + (MODEL_PAGES << LZ_PAGE_SHIFT); next += LZ_PAGE_SIZE)
			assert(!model[(next - BASE) >> LZ_PAGE_SHIFT].kind);
		for (size_t i = 0; i < MODEL_PAGES; i++)
			expected[model[i].kind] += 1;
		lz_table_pages(&table, counted);
		assert(memcmp(counted + 1, expected + 1, 4 * sizeof(counted[0])) == 0);

		uint8_t used[LEVELS] = { 0 };
		uint16_t map[LEVELS] = { 40, 41, 42, 43 };
		lz_table_used(&table, used, LEVELS);
		lz_table_finish(&table, map, LEVELS);
		for (uint64_t i = 0; i < table.count; i++)
			if (table.rows[i].kind == LZ_KIND_DUMPED)
				assert(table.rows[i].source >= 40 && used[table.rows[i].source - 40]);
		lz_table_free(&table);
	}
	free(image.bytes);
}

static void test_what_cannot_be_read(void)
{
	struct lz_pagemap pagemap;
	struct lz_pagemap_error error;
	int pipe_fds[2];

	assert(pipe(pipe_fds) == 0);
	assert(lz_pagemap_read(pipe_fds[0], &pagemap, &error) == -ESPIPE);
	assert(error.code == LZ_BAD_NOTHING);
	close(pipe_fds[0]);
	close(pipe_fds[1]);
	assert(lz_pagemap_read(-1, &pagemap, &error) == -EBADF);
}

int main(void)
{
	test_records_across_the_buffer();
	test_damage();
	test_flattening();
	test_what_cannot_be_read();
	puts("test_pagemap: ok");
	return 0;
}
