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

/* served.rs has the table of these. */
enum odma_state {
	ODMA_FREE = 0,
	ODMA_FOREIGN = 1,
	ODMA_BOUND = 2,
	ODMA_REFUSED = 3,
	ODMA_LEAVING = 4,
};

enum odma_event {
	ODMA_FOUND = 0,
	ODMA_TAKEN = 1,
	ODMA_BIND = 2,
	ODMA_DENIED = 3,
	ODMA_UNBOUND = 4,
	ODMA_PROBE_FAILED = 5,
	ODMA_SETTLED = 6,
	ODMA_REMOVED = 7,
};

/* In the order in which they are done. */
enum odma_act {
	ODMA_ACT_HOLD_MODULE = 1 << 0,
	ODMA_ACT_QUIET = 1 << 1,
	ODMA_ACT_SERVE = 1 << 2,
	ODMA_ACT_REFUSE = 1 << 3,
	ODMA_ACT_RESTORE = 1 << 4,
	ODMA_ACT_LEAKS = 1 << 5,
	ODMA_ACT_TRIM = 1 << 6,
	ODMA_ACT_SETTLE = 1 << 7,
	ODMA_ACT_DROP_MODULE = 1 << 8,
	ODMA_ACT_FORGET = 1 << 9,
};

enum odma_admission {
	ODMA_ADMIT_GO = 0,
	ODMA_ADMIT_START = 1,
	ODMA_ADMIT_CLOSING = 2,
	ODMA_ADMIT_FOREIGN = 3,
	ODMA_ADMIT_LOST = 4,
};

/* A driver's mistake in taking a mapping down, as its release is answered. */
enum odma_misuse {
	ODMA_RELEASED = 0,
	ODMA_NOT_MAPPED = 1,
	ODMA_OTHER_LENGTH = 2,
};

struct odma_core;

u64 odma_core_bytes(const struct odma_core_config *config);
const struct odma_core *odma_core_create(const struct odma_core_config *config, u8 *memory, u64 len);

/* Any context, no lock. */
u64 odma_core_hit(const struct odma_core *core, u64 start, u64 len);
int odma_core_hopeless(const struct odma_core *core, u64 start, u64 len);
int odma_core_release(const struct odma_core *core, u64 bus, u64 len);
u64 odma_core_next_window(const struct odma_core *core, u64 from, struct odma_window *window);
u32 odma_core_function_next(u32 state, u32 event, u32 *acts);
u32 odma_core_admit(bool closing, bool running, u32 foreign, u32 using);

/* With a queue of one's own, and interrupts off. */
int odma_core_map(const struct odma_core *core, u32 queue, u64 start, u64 len, u64 *bus);
int odma_core_map_list(const struct odma_core *core, u32 queue, struct odma_list *list);
u32 odma_core_trim(const struct odma_core *core, u32 queue);
void odma_core_trimmed(const struct odma_core *core, u32 queue);

/* Interrupts are off. */
void odma_core_stats(const struct odma_core *core, struct odma_core_stats *stats);

#endif
