/* SPDX-License-Identifier: MIT */
/*
 * A header of the page server's protocol in its two sizes, where C reads or writes one. What messages there are, what
 * each may carry and how it is answered is lazyd/wire.py's; the layout stands there, too, and tests hold one to the
 * other.
 */
#ifndef LZ_WIRE_H
#define LZ_WIRE_H

#include <stdint.h>
#include <string.h>

#define LZ_HEADER_MAX 32U /* and the narrow one has 24 bytes */

#define PS_ADD 1U
#define PS_HOLE 2U
#define PS_ADD_F 6U
#define PS_GET 7U
#define PE_PARENT 1U
#define PE_LAZY 2U
#define PE_PRESENT 4U
#define PE_LAZYD 0x8000U

struct lz_message {
	uint32_t command, flags;
	uint64_t pages, address, destination;
};

static inline struct lz_message lz_wire_decode(const uint8_t *at, uint32_t header_bytes)
{
	struct lz_message message;
	uint32_t word, narrow;

	memcpy(&word, at, 4);
	memcpy(&narrow, at + 4, 4);
	message.command = word & 0xffff;
	message.flags = word >> 16;
	message.pages = narrow;
	at += 8;
	if (header_bytes == LZ_HEADER_MAX) {
		memcpy(&message.pages, at, 8);
		at += 8;
	}
	memcpy(&message.address, at, 8);
	memcpy(&message.destination, at + 8, 8);
	return message;
}

/* Write a header of header_bytes; the narrow one has room for 32 bits of pages. */
static inline void lz_wire_encode(uint8_t *at, uint32_t header_bytes, const struct lz_message *message)
{
	const uint32_t word = message->command | message->flags << 16, narrow = (uint32_t)message->pages;
	const uint64_t wide = message->pages;

	memset(at, 0, header_bytes);
	memcpy(at, &word, 4);
	if (header_bytes == LZ_HEADER_MAX)
		memcpy(at + 8, &wide, 8);
	else
		memcpy(at + 4, &narrow, 4);
	memcpy(at + header_bytes - 16, &message->address, 8);
	memcpy(at + header_bytes - 8, &message->destination, 8);
}

#endif
