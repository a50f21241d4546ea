// SPDX-License-Identifier: GPL-2.0
/* What a mapping costs, through outboard_dma and through the published scheme: the same pages in the same order. */
#include "bench.h"

#include <linux/ktime.h>
#include <linux/sched.h>
#include <linux/vmalloc.h>

#include "published.h"
#include "stress.h"

#define ROUNDS 5
#define SG_ENTRIES 256
#define SG_LIVE 16

struct live {
	u64 bus, phys;
};

static struct device *dev;
static bool ours;
static struct rnd_state random_state;

static u32 random_below(u32 below)
{
	return prandom_u32_state(&random_state) % below;
}

static u64 map(u64 phys)
{
	if (!ours)
		return published_map(phys, PAGE_SIZE);
	return dma_map_page(dev, pfn_to_page(PHYS_PFN(phys)), 0, PAGE_SIZE, DMA_BIDIRECTIONAL);
}

static void unmap(u64 bus)
{
	if (ours)
		dma_unmap_page(dev, bus, PAGE_SIZE, DMA_BIDIRECTIONAL);
	else
		published_unmap(bus, PAGE_SIZE);
}

/* A page of the cluster under way: clusters of 16 to 64 neighbours, each in 256 KiB of its own. */
static u64 next_page(u64 *block, u32 *left, u64 *at)
{
	u64 blocks = (stress_ram_end - stress_ram_start) / SZ_256K;

	if (!*left) {
		*left = 16 + random_below(49);
		*at = stress_ram_start + (*block)++ % blocks * SZ_256K + random_below(65 - *left) * PAGE_SIZE;
	}
	--*left;
	*at += PAGE_SIZE;
	return *at - PAGE_SIZE;
}

/* The cost of an unmapping and a mapping while `count` are live, in each of several rounds. */
static int churn(u32 count, u32 pairs, char *report, size_t size)
{
	struct live *live = vmalloc_huge(array_size(count, sizeof(*live)), GFP_KERNEL);
	u32 i, made = 0, left = 0, round;
	u64 block = 0, at = 0;
	int error = 0, len = 0;

	if (!live)
		return -ENOMEM;
	for (made = 0; made < count; made++) {
		live[made].phys = next_page(&block, &left, &at);
		live[made].bus = map(live[made].phys);
		if (live[made].bus == ~0ull) {
			error = -ENOSPC;
			break;
		}
		cond_resched();
	}
	for (round = 0; !error && round <= ROUNDS; round++) {
		u64 begin = ktime_get_ns(), ns;

		for (i = 0; i < pairs; i++) {
			struct live *one = &live[random_below(count)];

			unmap(one->bus);
			one->bus = map(one->phys);
		}
		ns = ktime_get_ns() - begin;
		/* The first one warms up. */
		if (round)
			len += scnprintf(report + len, size - len, "ns %llu\n", div_u64(ns, pairs));
		cond_resched();
	}
	while (made) {
		unmap(live[--made].bus);
		cond_resched();
	}
	vfree(live);
	return error;
}

static int map_list(struct sg_table *table, struct live *buses)
{
	struct scatterlist *sg;
	int i;

	if (ours)
		return dma_map_sg(dev, table->sgl, SG_ENTRIES, DMA_BIDIRECTIONAL) ? 0 : -ENOSPC;
	for_each_sg(table->sgl, sg, SG_ENTRIES, i) {
		buses[i].bus = published_map(sg_phys(sg), PAGE_SIZE);
		if (buses[i].bus == ~0ull)
			return -ENOSPC;
	}
	return 0;
}

static void unmap_list(struct sg_table *table, struct live *buses)
{
	int i;

	if (ours) {
		dma_unmap_sg(dev, table->sgl, SG_ENTRIES, DMA_BIDIRECTIONAL);
		return;
	}
	for (i = 0; i < SG_ENTRIES; i++)
		published_unmap(buses[i].bus, PAGE_SIZE);
}

/* Lists of clusters at random places; a few are live at a time. How many exits, the caller counts (ours) or is told. */
static int lists(u32 count, char *report, size_t size)
{
	u64 blocks = (stress_ram_end - stress_ram_start) / SZ_256K, before = published_exits;
	struct live (*buses)[SG_ENTRIES] = vzalloc(array_size(SG_LIVE, sizeof(*buses)));
	struct sg_table *tables = vzalloc(array_size(SG_LIVE, sizeof(*tables)));
	int i, slot, error = buses && tables ? 0 : -ENOMEM, mapped = 0;

	for (i = 0; !error && i < SG_LIVE; i++)
		error = sg_alloc_table(&tables[i], SG_ENTRIES, GFP_KERNEL);
	for (i = 0; !error && i < count; i++) {
		struct scatterlist *sg;
		u32 j, left = 0;
		u64 at = 0;

		slot = i % SG_LIVE;
		if (i >= SG_LIVE) {
			unmap_list(&tables[slot], buses[slot]);
			mapped--;
		}
		for_each_sg(tables[slot].sgl, sg, SG_ENTRIES, j) {
			u64 block = random_below(blocks);

			sg_set_page(sg, pfn_to_page(PHYS_PFN(next_page(&block, &left, &at))), PAGE_SIZE, 0);
		}
		error = map_list(&tables[slot], buses[slot]);
		mapped += !error;
		cond_resched();
	}
	for (slot = 0; slot < mapped; slot++)
		unmap_list(&tables[slot], buses[slot]);
	for (i = 0; tables && i < SG_LIVE; i++)
		sg_free_table(&tables[i]);
	vfree(tables);
	vfree(buses);
	scnprintf(report, size, "entries %llu\nexits %llu\n", (u64)count * SG_ENTRIES, published_exits - before);
	return error;
}

int bench_command(struct device *device, const char *text, char *report, size_t size)
{
	char mode[16];
	u32 a, b;
	int error;
	bool churning = sscanf(text, "churn %15s %u %u", mode, &a, &b) == 3;

	if (!churning && sscanf(text, "lists %15s %u", mode, &a) != 2)
		return -ENOENT;
	ours = !strcmp(mode, "ours");
	if (!a || (churning && !b) || (!ours && strcmp(mode, "published")))
		return -EINVAL;
	dev = device;
	prandom_seed_state(&random_state, 815);
	error = ours ? 0 : published_open();
	if (error)
		return error;
	error = churning ? churn(a, b, report, size) : lists(a, report, size);
	if (!ours)
		published_close();
	return error;
}
