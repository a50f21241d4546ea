/* SPDX-License-Identifier: GPL-2.0 */
/* Functions of the Rust half that the quirks call; core/src/quirks/ffi.rs defines them. */
#ifndef OUTBOARD_QUIRKS_CORE_H
#define OUTBOARD_QUIRKS_CORE_H

#include <linux/build_bug.h>
#include <linux/types.h>

#define ODMA_ZVA_WORDS 4

struct odma_zva_site {
	u64 at;
	u32 words;
	u32 reserved;
	u32 old[ODMA_ZVA_WORDS];
	u32 new[ODMA_ZVA_WORDS];
};
static_assert(sizeof(struct odma_zva_site) == 48);

struct odma_zva_seen {
	u32 tests;
	u32 roomy;
	u32 covered;
	u32 uncovered;
	u32 readers;
	u32 unreported;
};
static_assert(sizeof(struct odma_zva_seen) == 24);

void odma_core_zva_scan(const u32 *text, size_t count, bool stores, struct odma_zva_site *sites, size_t room,
			struct odma_zva_seen *seen);

enum odma_uvm_verdict { ODMA_UVM_LEAVE = 0, ODMA_UVM_DEFAULT = 1, ODMA_UVM_STRANGE = 2 };
u32 odma_core_uvm_judge(u64 length, u64 physical_offset, u64 page, u64 alignment);

#endif
