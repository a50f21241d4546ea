// SPDX-License-Identifier: GPL-2.0
/* Scatterlists: one exit however many windows are missing, neighbours on the bus merged. */
#include "odma.h"

#include <linux/scatterlist.h>

#include "trace.h"

/* A scatterlist for the core, which asks by index. */
struct walk {
	struct odma_list list;
	struct scatterlist *first;
	struct scatterlist *at;
	u32 index;
	/* Where the core last went back to. It goes back to ever later entries, so all its passes together are short. */
	struct scatterlist *anchor;
	u32 anchor_index;
};

static struct scatterlist *seek(struct odma_list *list, u32 index)
{
	struct walk *walk = container_of(list, struct walk, list);
	bool back = index < walk->index;

	if (back && walk->anchor_index <= index) {
		walk->at = walk->anchor;
		walk->index = walk->anchor_index;
	} else if (back) {
		walk->at = walk->first;
		walk->index = 0;
	}
	for (; walk->index < index; walk->index++)
		walk->at = sg_next(walk->at);
	if (back) {
		walk->anchor = walk->at;
		walk->anchor_index = index;
	}
	return walk->at;
}

static struct odma_range entry_range(struct odma_list *list, u32 index)
{
	struct scatterlist *sg = seek(list, index);

	return (struct odma_range){ .start = sg_phys(sg), .len = sg->length };
}

static u64 entry_bus(struct odma_list *list, u32 index)
{
	return sg_dma_address(seek(list, index));
}

static void set_entry_bus(struct odma_list *list, u32 index, u64 bus)
{
	sg_dma_address(seek(list, index)) = bus;
}

/*
 * Entries that are mapped with interrupts off at a time. Long lists of scattered pages make an exit for each 256 windows, so this bounds those to
 * four; and 4 MiB of neighbours are two windows of the largest kind.
 */
#define MOST_AT_A_TIME 1024

static void release_entries(struct odma_domain *domain, struct scatterlist *first, int nents)
{
	struct scatterlist *sg;
	int i;

	for_each_sg(first, sg, nents, i)
		odma_core_release(domain->core, sg_dma_address(sg), sg->length);
}

/* The lock-free way: all entries, or none. What makes the others hopeless goes to failure. */
static bool hit_all(struct odma_domain *domain, struct scatterlist *first, int nents, int *failure)
{
	struct scatterlist *sg;
	int i;

	for_each_sg(first, sg, nents, i) {
		sg_dma_address(sg) = odma_core_hit(domain->core, sg_phys(sg), sg->length);
		if (unlikely(sg_dma_address(sg) == ODMA_UNRESOLVED)) {
			release_entries(domain, first, i);
			*failure = odma_core_hopeless(domain->core, sg_phys(sg), sg->length);
			return false;
		}
	}
	return true;
}

/* A part of a list, with interrupts off while it is planned and asked for. */
static int map_part(struct odma_client *client, struct scatterlist *first, int nents)
{
	struct odma_domain *domain = client->domain;
	unsigned int waits = 0;
	int failure;

	do {
		struct walk walk = {
			.list = { .count = nents, .range = entry_range, .bus = entry_bus, .set_bus = set_entry_bus },
			.first = first, .at = first, .anchor = first,
		};
		unsigned long flags;
		u32 queue = odma_queue_take(domain, &flags);

		failure = odma_core_map_list(domain->core, queue, &walk.list);
		odma_queue_give(domain, queue, flags);
	} while (failure == ODMA_RETURNING && odma_wait(client, false, &waits));
	return failure;
}

/* All entries, or none; part by part, so that interrupts come in between. */
static int map_all(struct odma_client *client, struct scatterlist *first, int nents)
{
	struct scatterlist *part = first;
	int done, i, failure = 0;
	bool missed = false;

	for (done = 0; done < nents && !failure;) {
		int count = min(nents - done, MOST_AT_A_TIME);

		if (!hit_all(client->domain, part, count, &failure)) {
			missed = true;
			if (!failure)
				failure = map_part(client, part, count);
		}
		if (failure)
			break;
		done += count;
		for (i = 0; done < nents && i < count; i++)
			part = sg_next(part);
	}
	if (failure)
		release_entries(client->domain, first, done);
	if (missed)
		this_cpu_inc(client->counts->misses);
	else
		this_cpu_inc(client->counts->hits);
	return failure;
}

static bool within_mask(struct scatterlist *first, int nents, u64 mask)
{
	struct scatterlist *sg;
	int i;

	for_each_sg(first, sg, nents, i)
		if (sg_dma_address(sg) + sg->length - 1 > mask)
			return false;
	return true;
}

/* Puts the segments at the front of the list; their number. Writing never overtakes reading. */
static int merge(struct device *dev, struct scatterlist *first, int nents)
{
	u64 most = dma_get_max_seg_size(dev), boundary = dma_get_seg_boundary(dev);
	struct scatterlist *sg, *out = first;
	u64 bus = sg_dma_address(first), len = first->length;
	int i, segments = 1;

	for_each_sg(first, sg, nents, i) {
		u64 next = sg_dma_address(sg);

		if (i == 0)
			continue;
		if (IS_ENABLED(CONFIG_NEED_SG_DMA_LENGTH) && bus + len == next &&
		    len + sg->length <= most &&
		    (bus & ~boundary) == ((next + sg->length - 1) & ~boundary)) {
			len += sg->length;
			continue;
		}
		sg_dma_address(out) = bus;
		sg_dma_len(out) = len;
		out = sg_next(out);
		segments++;
		bus = next;
		len = sg->length;
	}
	sg_dma_address(out) = bus;
	sg_dma_len(out) = len;
	/* What stood in the others is no mapping of theirs any more. */
	for (i = segments; i < nents; i++) {
		out = sg_next(out);
		sg_dma_address(out) = DMA_MAPPING_ERROR;
		sg_dma_len(out) = 0;
	}
	return segments;
}

int odma_map_sg(struct device *dev, struct scatterlist *first, int nents, enum dma_data_direction dir,
		unsigned long attrs)
{
	struct odma_client *client = odma_client_of(dev);
	struct odma_domain *domain = client->domain;
	int failure, segments;

	if (nents <= 0)
		return -EINVAL;
	failure = map_all(client, first, nents);
	if (failure) {
		odma_failed(client, failure, sg_phys(first), first->length, attrs);
		return failure == ODMA_NOT_RAM || failure == ODMA_HOST ? -EIO : -ENOMEM;
	}
	if (unlikely(!within_mask(first, nents, odma_mask(dev)))) {
		release_entries(domain, first, nents);
		this_cpu_inc(client->counts->masked);
		if (!(attrs & DMA_ATTR_NO_WARN))
			dev_warn_ratelimited(dev, "DMA mapping of a list is beyond the device's mask %#llx\n",
					     odma_mask(dev));
		return -EIO;
	}
	this_cpu_add(client->counts->live, nents);
	if (odma_recording(domain))
		odma_record_map_sg(domain, first, nents);
	segments = merge(dev, first, nents);
	trace_odma_map_sg(dev, nents, segments);
	return segments;
}

/* Where the segments of a list stand, while its entries are released. */
struct segments {
	struct scatterlist *next;	/* the segment behind this one */
	u64 bus, left;			/* of this one, what is not released */
	int used;
};

/* Releases an entry, whose reference is its own; the merged segments say where it was. False if the segments end before it. */
static bool release_entry(struct odma_client *client, struct segments *at, struct scatterlist *sg, int *released)
{
	if (!at->left && at->next && sg_dma_len(at->next)) {
		at->bus = sg_dma_address(at->next);
		at->left = sg_dma_len(at->next);
		at->next = sg_next(at->next);
		at->used++;
	}
	if (!at->left || at->left < sg->length)
		return false;
	if (odma_release(client, at->bus, sg->length) != ODMA_NOT_MAPPED)
		(*released)++;
	at->bus += sg->length;
	at->left -= sg->length;
	return true;
}

void odma_unmap_sg(struct device *dev, struct scatterlist *first, int nents,
		   enum dma_data_direction dir, unsigned long attrs)
{
	struct odma_client *client = odma_client_of(dev);
	struct segments at = { .next = first };
	struct scatterlist *sg;
	int i, released = 0;

	if (nents <= 0)
		return;
	if (odma_recording(client->domain))
		odma_record_unmap(client->domain, sg_dma_address(first), first->length, nents);
	for (i = 0, sg = first; i < nents && sg; i++, sg = sg_next(sg)) {
		if (release_entry(client, &at, sg, &released))
			continue;
		this_cpu_add(client->counts->unknown, nents - i);
		if (odma_tell_once(client, ODMA_TOLD_NOT_MAPPED))
			dev_warn(dev, "DMA unmapping of a list of %d, entry %d: not mapped so\n", nents, i);
		break;
	}
	/* Segments that are left were mapped by this list: the driver counts what dma_map_sg() returned, instead of what it was given. */
	if (i == nents && (at.left || (at.used < nents && at.next && sg_dma_len(at.next)))) {
		this_cpu_inc(client->counts->misused);
		if (odma_tell_once(client, ODMA_TOLD_SHORT_LIST))
			dev_warn(dev, "DMA unmapping of a list by its %d segments, not by its entries; the rest is unmapped too\n",
				 nents);
		for (; sg && (at.left || at.used < nents); sg = sg_next(sg))
			if (!release_entry(client, &at, sg, &released))
				break;
	}
	this_cpu_sub(client->counts->live, released);
	trace_odma_unmap_sg(dev, released);
}
