// SPDX-License-Identifier: GPL-2.0
/* Memory for both sides. */
#include "odma.h"

#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/xarray.h>

/*
 * The kernel promises drivers that such memory starts at a multiple of its size on the bus too (Documentation/core-api/dma-api-howto.rst).
 * The host promises multiples of 16 KiB and no more. What does not come out right is taken from the middle of a piece twice as large.
 */
struct padded {
	void *whole;
	dma_addr_t bus;
	size_t size;
};

/* By page of what the driver has. */
static DEFINE_XARRAY_FLAGS(all_padded, XA_FLAGS_LOCK_IRQ);

static u64 coherent_mask(struct device *dev)
{
	return min_not_zero(dev->coherent_dma_mask, dev->bus_dma_limit);
}

/* Pages of RAM, mapped whole. */
static void *take(struct device *dev, size_t size, dma_addr_t *bus, gfp_t gfp, unsigned long attrs)
{
	void *memory = alloc_pages_exact(size, gfp);

	if (!memory)
		return NULL;
	*bus = odma_map(dev, virt_to_phys(memory), size, coherent_mask(dev), attrs,
			gfpflags_allow_blocking(gfp));
	if (*bus == DMA_MAPPING_ERROR) {
		free_pages_exact(memory, size);
		return NULL;
	}
	return memory;
}

static void give(struct device *dev, void *memory, size_t size, dma_addr_t bus)
{
	odma_unmap(dev, bus, size);
	free_pages_exact(memory, size);
}

static void *take_padded(struct device *dev, size_t alignment, dma_addr_t *bus, gfp_t gfp,
			 unsigned long attrs)
{
	struct padded *padded = kmalloc(sizeof(*padded), gfp & ~__GFP_ZERO);
	unsigned long flags;
	void *memory;
	int error;

	if (!padded)
		return NULL;
	padded->size = 2 * alignment;
	padded->whole = take(dev, padded->size, &padded->bus, gfp, attrs);
	if (!padded->whole)
		goto free;
	*bus = ALIGN(padded->bus, alignment);
	memory = padded->whole + (*bus - padded->bus);
	xa_lock_irqsave(&all_padded, flags);
	error = xa_err(__xa_store(&all_padded, (unsigned long)memory >> PAGE_SHIFT, padded,
				  GFP_NOWAIT | __GFP_NOWARN));
	xa_unlock_irqrestore(&all_padded, flags);
	if (!error)
		return memory;
	give(dev, padded->whole, padded->size, padded->bus);
free:
	kfree(padded);
	return NULL;
}

/* Any context that gfp allows. */
void *odma_alloc(struct device *dev, size_t size, dma_addr_t *bus, gfp_t gfp, unsigned long attrs)
{
	size_t alignment;
	void *memory;

	if (!size || size > SZ_1G)
		return NULL;
	size = PAGE_ALIGN(size);
	alignment = PAGE_SIZE << get_order(size);
	/* Where the pages are does not matter: the host picks the bus address. */
	gfp &= ~(__GFP_DMA | __GFP_DMA32 | __GFP_HIGHMEM | __GFP_COMP);
	gfp |= __GFP_ZERO;
	if (attrs & DMA_ATTR_NO_WARN)
		gfp |= __GFP_NOWARN;
	memory = take(dev, size, bus, gfp, attrs);
	if (!memory || IS_ALIGNED(*bus, alignment))
		return memory;
	give(dev, memory, size, *bus);
	return take_padded(dev, alignment, bus, gfp | __GFP_NOWARN, attrs);
}

void odma_free(struct device *dev, size_t size, void *memory, dma_addr_t bus)
{
	struct padded *padded;
	unsigned long flags;

	xa_lock_irqsave(&all_padded, flags);
	padded = __xa_erase(&all_padded, (unsigned long)memory >> PAGE_SHIFT);
	xa_unlock_irqrestore(&all_padded, flags);
	if (padded)
		give(dev, padded->whole, padded->size, padded->bus);
	else
		give(dev, memory, PAGE_ALIGN(size), bus);
	kfree(padded);
}
