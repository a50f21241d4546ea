// SPDX-License-Identifier: GPL-2.0
/*
 * Mistakes that drivers make with their mappings, one at a time, and what the module promises beside them:
 *
 *   misuse lists    lists unmapped by the number of their segments; entries behind the segments are empty
 *   misuse length   a mapping unmapped with another length
 *   misuse twice    one of two neighbours unmapped twice; the other stays mapped until
 *   misuse end      it is unmapped
 *   misuse free     memory freed twice, and with another length
 *   misuse large    memory for both sides of 2 to 4 MiB, aligned to its size
 *   misuse long     a list of 20,000 entries; interrupts come while it is mapped
 *   misuse master   leaves bus master on
 */
#include "stress.h"

#include <linux/delay.h>
#include <linux/jiffies.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/pci.h>
#include <linux/sizes.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <linux/timer.h>
#include <linux/vmalloc.h>

#define DIRECTION DMA_TO_DEVICE
#define LARGE 8
#define LONG_ENTRIES 20000

/* Maps lists of `split` and 8 - `split` neighbouring pages from two places, and unmaps them by their segments. */
static const char *short_list(struct device *dev, unsigned int split, int *segments)
{
	struct page *first = alloc_pages(GFP_KERNEL, 3), *second = alloc_pages(GFP_KERNEL, 5);
	const char *wrong = NULL;
	struct scatterlist *sg;
	struct sg_table table;
	int i;

	if (!first || !second || sg_alloc_table(&table, 8, GFP_KERNEL)) {
		wrong = "no memory";
		goto free;
	}
	for_each_sg(table.sgl, sg, 8, i)
		sg_set_page(sg, i < split ? first + i : second + 20 + i, PAGE_SIZE, 0);
	*segments = dma_map_sg_attrs(dev, table.sgl, 8, DIRECTION, 0);
	if (*segments <= 0)
		wrong = "a list is not mapped";
	if (*segments >= 8)
		wrong = "no neighbours were merged";
	for_each_sg(table.sgl, sg, 8, i)
		if (i >= *segments && sg_dma_len(sg))
			wrong = "an entry behind the segments is not empty";
	/* The mistake: not the list's entries. */
	if (*segments > 0)
		dma_unmap_sg_attrs(dev, table.sgl, *segments, DIRECTION, 0);
	sg_free_table(&table);
free:
	if (first)
		__free_pages(first, 3);
	if (second)
		__free_pages(second, 5);
	return wrong;
}

static const char *lists(struct device *dev)
{
	static const unsigned int splits[] = { 8, 4, 2, 1 };
	const char *wrong = NULL;
	int i, segments;

	for (i = 0; i < ARRAY_SIZE(splits) && !wrong; i++)
		wrong = short_list(dev, splits[i], &segments);
	return wrong;
}

static const char *length(struct device *dev)
{
	struct page *pages = alloc_pages(GFP_KERNEL, 1);
	const char *wrong = NULL;
	dma_addr_t bus;

	if (!pages)
		return "no memory";
	bus = dma_map_page_attrs(dev, pages, 0, 2 * PAGE_SIZE, DIRECTION, 0);
	if (dma_mapping_error(dev, bus))
		wrong = "not mapped";
	else
		dma_unmap_page_attrs(dev, bus, PAGE_SIZE, DIRECTION, 0);
	__free_pages(pages, 1);
	return wrong;
}

static struct page *neighbours;
static dma_addr_t kept;

static const char *twice(struct device *dev)
{
	dma_addr_t gone;

	if (neighbours)
		return "not ended";
	neighbours = alloc_pages(GFP_KERNEL, 1);
	if (!neighbours)
		return "no memory";
	gone = dma_map_page_attrs(dev, neighbours, 0, PAGE_SIZE, DIRECTION, 0);
	kept = dma_map_page_attrs(dev, neighbours, PAGE_SIZE, PAGE_SIZE, DIRECTION, 0);
	if (dma_mapping_error(dev, gone) || dma_mapping_error(dev, kept))
		return "not mapped";
	dma_unmap_page_attrs(dev, gone, PAGE_SIZE, DIRECTION, 0);
	dma_unmap_page_attrs(dev, gone, PAGE_SIZE, DIRECTION, 0);
	return NULL;
}

static const char *end(struct device *dev)
{
	if (!neighbours)
		return "not begun";
	dma_unmap_page_attrs(dev, kept, PAGE_SIZE, DIRECTION, 0);
	__free_pages(neighbours, 1);
	neighbours = NULL;
	return NULL;
}

static const char *free_wrongly(struct device *dev)
{
	dma_addr_t bus;
	void *memory = dma_alloc_coherent(dev, SZ_64K, &bus, GFP_KERNEL);

	if (!memory)
		return "no memory";
	dma_free_coherent(dev, SZ_64K, memory, bus);
	dma_free_coherent(dev, SZ_64K, memory, bus);
	memory = dma_alloc_coherent(dev, SZ_64K, &bus, GFP_KERNEL);
	if (!memory)
		return "no memory";
	dma_free_coherent(dev, SZ_32K, memory, bus);
	return NULL;
}

static const char *large(struct device *dev)
{
	struct { void *memory; dma_addr_t bus; size_t size; } all[LARGE] = {};
	const char *wrong = NULL;
	int i;

	for (i = 0; i < LARGE; i++) {
		all[i].size = SZ_2M + (i + 1) * SZ_256K;
		all[i].memory = dma_alloc_coherent(dev, all[i].size, &all[i].bus, GFP_KERNEL);
		if (!all[i].memory)
			wrong = "memory of more than 2 MiB cannot be had";
		else if (!IS_ALIGNED(all[i].bus, SZ_4M))
			wrong = "memory of more than 2 MiB is not aligned to its size on the bus";
		else if (memchr_inv(all[i].memory, 0, all[i].size))
			wrong = "memory that is not zeroed";
		else
			memset(all[i].memory, 0x5a, all[i].size);
	}
	for (i = 0; i < LARGE; i++)
		if (all[i].memory)
			dma_free_coherent(dev, all[i].size, all[i].memory, all[i].bus);
	return wrong;
}

/* The timer's interrupts on one CPU, while it is on. */
static struct timer_list ticker;
static bool ticking;
static ktime_t last_tick;
static s64 longest_us;

static void tick(struct timer_list *timer)
{
	ktime_t now = ktime_get();

	longest_us = max(longest_us, ktime_us_delta(now, last_tick));
	last_tick = now;
	if (READ_ONCE(ticking))
		mod_timer(timer, jiffies + 1);
}

static void stop_ticking(void)
{
	WRITE_ONCE(ticking, false);
	while (timer_pending(&ticker))
		msleep(1);
	/* What runs in a softirq has run. */
	synchronize_rcu();
}

/* Every other 16 KiB of RAM, on this CPU, whose timer goes on meanwhile. */
static const char *long_list(struct device *dev, s64 *whole_us)
{
	struct scatterlist *list = vmalloc(array_size(LONG_ENTRIES, sizeof(*list)));
	u64 room = (stress_ram_end - stress_ram_start) / SZ_32K;
	const char *wrong = NULL;
	ktime_t begin;
	int i, segments;

	if (!list)
		return "no memory";
	sg_init_table(list, LONG_ENTRIES);
	for (i = 0; i < LONG_ENTRIES; i++)
		sg_set_page(&list[i], pfn_to_page(PHYS_PFN(stress_ram_start + (i % room) * SZ_32K)), PAGE_SIZE, 0);
	timer_setup(&ticker, tick, TIMER_PINNED);
	longest_us = 0;
	ticking = true;
	migrate_disable();
	begin = last_tick = ktime_get();
	mod_timer(&ticker, jiffies + 1);
	segments = dma_map_sg_attrs(dev, list, LONG_ENTRIES, DIRECTION, 0);
	*whole_us = ktime_us_delta(ktime_get(), begin);
	migrate_enable();
	stop_ticking();
	if (segments <= 0)
		wrong = "a long list is not mapped";
	else
		dma_unmap_sg_attrs(dev, list, LONG_ENTRIES, DIRECTION, 0);
	vfree(list);
	return wrong;
}

int stress_misuse(struct device *dev, const char *text, char *report, size_t room)
{
	const char *wrong, *what;
	s64 whole_us = 0;

	if (strncmp(text, "misuse ", 7))
		return -ENOENT;
	what = text + 7;
	if (!strcmp(what, "lists"))
		wrong = lists(dev);
	else if (!strcmp(what, "length"))
		wrong = length(dev);
	else if (!strcmp(what, "twice"))
		wrong = twice(dev);
	else if (!strcmp(what, "end"))
		wrong = end(dev);
	else if (!strcmp(what, "free"))
		wrong = free_wrongly(dev);
	else if (!strcmp(what, "large"))
		wrong = large(dev);
	else if (!strcmp(what, "long"))
		wrong = long_list(dev, &whole_us);
	else if (!strcmp(what, "master"))
		wrong = (pci_set_master(to_pci_dev(dev)), NULL);
	else
		return -EINVAL;
	scnprintf(report, room, "whole_us %lld\nlongest_us %lld\nwrong %s\n", whole_us, longest_us, wrong ?: "nothing");
	return wrong ? -EUCLEAN : 0;
}
