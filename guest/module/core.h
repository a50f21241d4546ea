/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR MIT */
/* The Rust half; core/src/ffi.rs says what each function does and needs. core/tests/header.rs compares the two. */
#ifndef OUTBOARD_CORE_H
#define OUTBOARD_CORE_H

#include <linux/types.h>

#define ODMA_RAM_RANGES 8
/* Bus address of what has none. */
#define ODMA_UNRESOLVED (~0ull)

enum odma_failure {
	ODMA_MAPPED = 0,
	ODMA_NOT_RAM = 1,
	ODMA_BYTES = 2,
	ODMA_ENTRIES = 3,
	ODMA_NO_SPACE = 4,
	ODMA_HOST = 5,
	/* The same call may succeed in some milliseconds. */
	ODMA_RETURNING = 6,
};

struct odma_range {
	u64 start;
	u64 len;
};

struct odma_core_config {
	u64 limit_bytes;
	u32 limit_entries;
	u32 lines;
	struct odma_range ram[ODMA_RAM_RANGES];
	u32 ram_count;
	u32 queues;
	u8 *const *queue;
	void *context;
	void (*ring)(void *context, u32 queue, u32 count);
	u32 (*status)(void *context, u32 queue);
	void (*lock)(void *context);
	void (*unlock)(void *context);
};

struct odma_list {
	u32 count;
	u32 reserved;
	struct odma_range (*range)(struct odma_list *list, u32 index);
	u64 (*bus)(struct odma_list *list, u32 index);
	void (*set_bus)(struct odma_list *list, u32 index, u64 bus);
};

struct odma_core_stats {
	u64 mapped_bytes;
	u64 mapped;
	u64 used_bytes;
	u64 used;
	u64 slack;
	u64 misses;
	u64 maps;
	u64 unmaps;
	u64 ahead;
	u64 evicted;
	u64 replaced;
	u64 failures;
	u64 lost;
	u64 rings;
	u64 entries;
	u64 no_space;
	u64 returning;
	u64 refused;
	u64 last_refusal;
};

struct odma_window {
	u64 start;
	u64 len;
	u64 bus;
	u64 references;
	u64 live;
};

struct odma_core;

u64 odma_core_bytes(const struct odma_core_config *config);
const struct odma_core *odma_core_create(const struct odma_core_config *config, u8 *memory, u64 len);

/* Any context, no lock. */
u64 odma_core_hit(const struct odma_core *core, u64 start, u64 len);
int odma_core_hopeless(const struct odma_core *core, u64 start, u64 len);
int odma_core_release(const struct odma_core *core, u64 bus, u64 len);
u64 odma_core_next_window(const struct odma_core *core, u64 from, struct odma_window *window);

/* With a queue of one's own, and interrupts off. */
int odma_core_map(const struct odma_core *core, u32 queue, u64 start, u64 len, u64 *bus);
int odma_core_map_list(const struct odma_core *core, u32 queue, struct odma_list *list);
u32 odma_core_trim(const struct odma_core *core, u32 queue);
void odma_core_trimmed(const struct odma_core *core, u32 queue);

/* Interrupts are off. */
void odma_core_stats(const struct odma_core *core, struct odma_core_stats *stats);

#endif
