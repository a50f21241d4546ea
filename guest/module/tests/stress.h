/* SPDX-License-Identifier: GPL-2.0 */
#ifndef OUTBOARD_STRESS_H
#define OUTBOARD_STRESS_H

#include <linux/completion.h>
#include <linux/device.h>
#include <linux/dma-mapping.h>
#include <linux/interrupt.h>
#include <linux/irq_work.h>
#include <linux/prandom.h>
#include <linux/scatterlist.h>
#include <linux/types.h>

/* Most entries of a list that a worker maps. More than one page of them, so that lists are chained. */
#define LIST_ENTRIES 300
#define LISTS 16

/* Where a step of a worker runs. */
enum place { IN_PROCESS, IRQS_OFF, IN_SOFTIRQ, IN_HARDIRQ, PLACES };

struct mapping {
	dma_addr_t bus;
	phys_addr_t phys;
	u32 len;
};

struct list {
	struct sg_table table;
	int nents;		/* of this mapping; 0: not mapped */
};

/* What one vCPU does. All of it belongs to that vCPU's thread, wherever a step of it runs. */
struct worker {
	struct device *dev;
	int cpu;
	struct rnd_state random;
	struct mapping *live;	/* most of them */
	u32 most, count;
	u32 spare;		/* at the end of `live`: what a step wants mapped and is not */
	struct list lists[LISTS];
	u64 mapped, failed, lists_mapped, lists_failed, segments, entries;
	const char *wrong;	/* what must not be; NULL if nothing */

	void (*step)(struct worker *worker);
	struct completion done;
	struct completion stepped;
	struct tasklet_struct tasklet;
	struct irq_work irq_work;
	u64 places[PLACES];	/* steps there */

	/* For the step. */
	u32 rounds;
	u64 first, stride;	/* of the pieces that the vCPUs share out among themselves */
	bool whole;		/* map each piece whole, not a page of it */
};

/* All pages of RAM that may be mapped: RAM without a hole, found at the start. */
extern phys_addr_t stress_ram_start, stress_ram_end;

u32 stress_random(struct worker *worker, u32 below);
void stress_map(struct worker *worker, phys_addr_t phys, u32 len);
void stress_unmap(struct worker *worker, u32 index);
void stress_mixed_step(struct worker *worker);
void stress_map_list(struct worker *worker, struct list *list);
void stress_unmap_list(struct worker *worker, struct list *list);
int stress_misuse(struct device *dev, const char *text, char *report, size_t room);
void stress_release_all(struct worker *worker);
void stress_run_in(struct worker *worker, enum place place);

#endif
