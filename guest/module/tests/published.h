/* SPDX-License-Identifier: GPL-2.0 */
#ifndef OUTBOARD_PUBLISHED_H
#define OUTBOARD_PUBLISHED_H

#include <linux/types.h>

/* Doorbells so far. */
extern u64 published_exits;

int published_open(void);
void published_close(void);
u64 published_map(u64 phys, u64 len);
void published_unmap(u64 bus, u64 len);

#endif
