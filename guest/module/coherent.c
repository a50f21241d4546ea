// SPDX-License-Identifier: GPL-2.0
/* Memory for both sides. */
#include "odma.h"

#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/xarray.h>

/*
 * The kernel promises drivers that such memory starts at a multiple of its size on the bus too (Documentation/core-api/dma-api-howto.rst).
 * The host promises multiples of 16 KiB and no more. What a window does not bring out right is mapped once more by itself (apart.c), and only where
 * that does not help either it is taken from the middle of a larger piece.
 */
struct piece {
	struct odma_client *client;
	size_t size;			/* of what the driver has */
	dma_addr_t bus;
	void *whole;			/* pages, and where they are mapped */
	size_t whole_size;
	dma_addr_t whole_bus;
	bool apart;			/* not in a window of the core's: by this name */
	u64 handle;
};

/* All that drivers have, by its first page. */
static DEFINE_XARRAY_FLAGS(pieces, XA_FLAGS_LOCK_IRQ);

static u64 coherent_mask(struct device *dev)
{
	return min_not_zero(dev->coherent_dma_mask, dev->bus_dma_limit);
}

static void unmap_piece(struct piece *piece)
{
	if (piece->apart) {
		odma_unmap_apart(piece->client, piece->handle);
		this_cpu_dec(piece->client->counts->live);
	} else {
		odma_unmap(piece->client->dev, piece->whole_bus, piece->whole_size);
	}
}

/* Pages of RAM, mapped in a window. */
static bool take(struct piece *piece, size_t size, gfp_t gfp, unsigned long attrs)
{
	struct device *dev = piece->client->dev;

	piece->whole_size = size;
	piece->whole = alloc_pages_exact(size, gfp);
	if (!piece->whole)
		return false;
	piece->whole_bus = odma_map(dev, virt_to_phys(piece->whole), size, coherent_mask(dev), attrs,
				    gfpflags_allow_blocking(gfp));
	if (piece->whole_bus != DMA_MAPPING_ERROR)
		return true;
	free_pages_exact(piece->whole, size);
	return false;
}

/* The same pages at a bus address that is a multiple of `alignment`. */
static bool take_apart(struct piece *piece, size_t alignment, bool may_sleep)
{
	struct device *dev = piece->client->dev;
	u64 bus;

	if (!odma_map_apart(piece->client, virt_to_phys(piece->whole), piece->whole_size, alignment, may_sleep,
			    &piece->handle, &bus))
		return false;
	if (bus + piece->whole_size - 1 > coherent_mask(dev)) {
		odma_unmap_apart(piece->client, piece->handle);
		return false;
	}
	odma_unmap(dev, piece->whole_bus, piece->whole_size);
	piece->whole_bus = bus;
	piece->apart = true;
	atomic64_inc(&piece->client->domain->apart);
	this_cpu_inc(piece->client->counts->live);
	return true;
}

static bool take_aligned(struct piece *piece, gfp_t gfp, unsigned long attrs)
{
	size_t alignment = PAGE_SIZE << get_order(piece->size);

	if (!take(piece, piece->size, gfp, attrs))
		return false;
	piece->bus = piece->whole_bus;
	if (IS_ALIGNED(piece->bus, alignment))
		return true;
	if (take_apart(piece, alignment, gfpflags_allow_blocking(gfp))) {
		piece->bus = piece->whole_bus;
		return true;
	}
	unmap_piece(piece);
	free_pages_exact(piece->whole, piece->whole_size);
	if (!take(piece, piece->size + alignment - SZ_16K, gfp | __GFP_NOWARN, attrs))
		return false;
	atomic64_inc(&piece->client->domain->padded);
	piece->bus = ALIGN(piece->whole_bus, alignment);
	return true;
}

/* Any context that gfp allows. */
void *odma_alloc(struct device *dev, size_t size, dma_addr_t *bus, gfp_t gfp, unsigned long attrs)
{
	struct piece *piece;
	unsigned long flags;
	void *memory;
	gfp_t plain;
	int error;

	if (!size || size > SZ_1G)
		return NULL;
	/* Where the pages are does not matter: the host picks the bus address. */
	gfp &= ~(__GFP_DMA | __GFP_DMA32 | __GFP_HIGHMEM | __GFP_COMP);
	if (attrs & DMA_ATTR_NO_WARN)
		gfp |= __GFP_NOWARN;
	plain = gfp & ~__GFP_ZERO;
	piece = kzalloc(sizeof(*piece), plain);
	if (!piece)
		return NULL;
	piece->client = odma_client_of(dev);
	piece->size = PAGE_ALIGN(size);
	if (!take_aligned(piece, gfp | __GFP_ZERO, attrs))
		goto free;
	memory = piece->whole + (piece->bus - piece->whole_bus);
	xa_lock_irqsave(&pieces, flags);
	error = xa_err(__xa_store(&pieces, (unsigned long)memory >> PAGE_SHIFT, piece, GFP_NOWAIT | __GFP_NOWARN));
	xa_unlock_irqrestore(&pieces, flags);
	if (!error) {
		*bus = piece->bus;
		return memory;
	}
	unmap_piece(piece);
	free_pages_exact(piece->whole, piece->whole_size);
free:
	kfree(piece);
	return NULL;
}

/* What is not a driver's own is not freed: it may be anybody's. */
void odma_free(struct device *dev, size_t size, void *memory, dma_addr_t bus)
{
	struct odma_client *client = odma_client_of(dev);
	unsigned long flags, index = (unsigned long)memory >> PAGE_SHIFT;
	struct piece *piece;

	xa_lock_irqsave(&pieces, flags);
	piece = xa_load(&pieces, index);
	if (piece && piece->client == client && piece->bus == bus)
		__xa_erase(&pieces, index);
	else
		piece = NULL;
	xa_unlock_irqrestore(&pieces, flags);
	if (!piece) {
		this_cpu_inc(client->counts->unknown);
		if (odma_tell_once(client, ODMA_TOLD_NO_MEMORY))
			dev_warn(dev, "memory for DMA at %pad is freed that the driver does not have; it stays as it is\n", &bus);
		return;
	}
	if (piece->size != PAGE_ALIGN(size)) {
		this_cpu_inc(client->counts->misused);
		if (odma_tell_once(client, ODMA_TOLD_LENGTH))
			dev_warn(dev, "memory for DMA of %zu bytes is freed as %zu bytes; all of it is freed\n", piece->size,
				 size);
	}
	unmap_piece(piece);
	free_pages_exact(piece->whole, piece->whole_size);
	kfree(piece);
}

/* A function is forgotten: what its drivers never freed is nobody's to free. */
void odma_forget_memory(struct odma_client *client)
{
	struct piece *piece;
	unsigned long index, flags;

	xa_lock_irqsave(&pieces, flags);
	xa_for_each(&pieces, index, piece) {
		if (piece->client == client) {
			__xa_erase(&pieces, index);
			kfree(piece);
		}
	}
	xa_unlock_irqrestore(&pieces, flags);
}
