// SPDX-License-Identifier: GPL-2.0
/* The DMA operations of a served function. sg.c has those on scatterlists, coherent.c what gets memory. */
#include "odma.h"

#include <linux/delay.h>
#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/rcupdate.h>
#include <linux/scatterlist.h>
#include <linux/sched.h>

#include "trace.h"

/*
 * What a call waits for at most: 24 ms and the calls in between where it sleeps, 12 ms where it cannot. How long a Mac keeps freed addresses is
 * not known; the model of it takes 10 ms.
 */
#define MOST_WAITS 24
#define SLEEP_US 1000
#define SPIN_US 500

/* The highest bus address that the function may be given. */
u64 odma_mask(struct device *dev)
{
	return min_not_zero(dma_get_mask(dev), dev->bus_dma_limit);
}

void odma_failed(struct odma_client *client, int failure, phys_addr_t phys, size_t size,
		 unsigned long attrs)
{
	static const char * const why[] = {
		[ODMA_NOT_RAM] = "is not RAM",
		[ODMA_BYTES] = "exceeds the bytes that the host maps at a time",
		[ODMA_ENTRIES] = "exceeds the mappings that the host makes at a time",
		[ODMA_NO_SPACE] = "found no room in the host's DMA window",
		[ODMA_HOST] = "was refused by the host",
		[ODMA_RETURNING] = "found no room in the host's DMA window before more of it returns",
	};

	if (failure == ODMA_NOT_RAM)
		this_cpu_inc(client->counts->refused);
	else
		this_cpu_inc(client->counts->failed);
	trace_odma_fail(client->dev, phys, size, failure);
	if (!(attrs & DMA_ATTR_NO_WARN))
		dev_warn_ratelimited(client->dev, "DMA mapping of %zu bytes at %pa %s\n", size, &phys,
				     failure > 0 && failure < ARRAY_SIZE(why) ? why[failure] : "failed");
}

/* Whether the kernel knows that this is a context that may sleep. One that does not count preemption never does. */
static bool sleepable(void)
{
	return preemptible() && !rcu_preempt_depth() && task_is_running(current);
}

/*
 * Waits a little for bus addresses to return, with no lock of ours held: whether the call that needs them may ask again. docs/guest-module.md
 * says when a call waits, and for how long.
 */
bool odma_wait(struct odma_client *client, bool may_sleep, unsigned int *waits)
{
	if (++*waits > MOST_WAITS)
		return false;
	if (may_sleep || sleepable())
		usleep_range(SLEEP_US, 2 * SLEEP_US);
	else if (!IS_ENABLED(CONFIG_PREEMPT_COUNT) && !in_interrupt() && !irqs_disabled())
		/* Perhaps under a spin lock of the driver's; nobody can say. */
		udelay(SPIN_US);
	else
		return false;
	this_cpu_inc(client->counts->waits);
	return true;
}

/* What no window covers. */
static int map_miss(struct odma_client *client, phys_addr_t phys, size_t size, u64 *bus, bool may_sleep)
{
	struct odma_domain *domain = client->domain;
	unsigned int waits = 0;
	int failure;

	do {
		unsigned long flags;
		u32 queue;

		failure = odma_core_hopeless(domain->core, phys, size);
		if (failure)
			break;
		queue = odma_queue_take(domain, &flags);
		failure = odma_core_map(domain->core, queue, phys, size, bus);
		odma_queue_give(domain, queue, flags);
	} while (failure == ODMA_RETURNING && odma_wait(client, may_sleep, &waits));
	return failure;
}

/* Any context. No lock and no exit where a window covers it. */
dma_addr_t odma_map(struct device *dev, phys_addr_t phys, size_t size, u64 mask, unsigned long attrs,
		    bool may_sleep)
{
	struct odma_client *client = odma_client_of(dev);
	struct odma_domain *domain = client->domain;
	u64 bus = odma_core_hit(domain->core, phys, size);
	bool hit = bus != ODMA_UNRESOLVED;

	if (!hit) {
		int failure = map_miss(client, phys, size, &bus, may_sleep);

		this_cpu_inc(client->counts->misses);
		if (failure) {
			odma_failed(client, failure, phys, size, attrs);
			return DMA_MAPPING_ERROR;
		}
	} else {
		this_cpu_inc(client->counts->hits);
	}
	if (unlikely(bus + size - 1 > mask)) {
		odma_core_release(domain->core, bus, size);
		this_cpu_inc(client->counts->masked);
		if (!(attrs & DMA_ATTR_NO_WARN))
			dev_warn_ratelimited(dev, "DMA mapping at bus address %#llx is beyond the device's mask %#llx\n",
					     bus, mask);
		return DMA_MAPPING_ERROR;
	}
	this_cpu_inc(client->counts->live);
	trace_odma_map(dev, phys, bus, size, hit);
	if (odma_recording(domain))
		odma_record_map(domain, bus, phys, size);
	return bus;
}

/* Whether this is to be said: the first time since the driver was bound. */
bool odma_tell_once(struct odma_client *client, enum odma_told what)
{
	return !test_and_set_bit(what, &client->told);
}

/* Gives back what a mapping took; counts a driver's mistakes, and says each kind once. enum odma_misuse. */
int odma_release(struct odma_client *client, dma_addr_t bus, size_t size)
{
	int misuse = odma_core_release(client->domain->core, bus, size);

	if (likely(!misuse))
		return misuse;
	if (misuse == ODMA_OTHER_LENGTH) {
		this_cpu_inc(client->counts->misused);
		if (odma_tell_once(client, ODMA_TOLD_LENGTH))
			dev_warn(client->dev, "DMA unmapping of %zu bytes at %pad: another length was mapped; all of that is unmapped\n",
				 size, &bus);
	} else {
		this_cpu_inc(client->counts->unknown);
		if (odma_tell_once(client, ODMA_TOLD_NOT_MAPPED))
			dev_warn(client->dev, "DMA unmapping of %zu bytes at %pad: not mapped; nothing is changed\n", size,
				 &bus);
	}
	return misuse;
}

/* Any context, no lock, no exit. False if nothing was mapped there. */
bool odma_unmap(struct device *dev, dma_addr_t bus, size_t size)
{
	struct odma_client *client = odma_client_of(dev);

	/* First, so that the recorder never sees the address again before it sees that it is free. */
	if (odma_recording(client->domain))
		odma_record_unmap(client->domain, bus, size, 1);
	if (odma_release(client, bus, size) == ODMA_NOT_MAPPED)
		return false;
	this_cpu_dec(client->counts->live);
	trace_odma_unmap(dev, bus, size);
	return true;
}

#ifdef ODMA_HAVE_MAP_PHYS
static dma_addr_t map_phys(struct device *dev, phys_addr_t phys, size_t size,
			   enum dma_data_direction dir, unsigned long attrs)
{
	if (attrs & DMA_ATTR_MMIO) {
		/* A Mac maps its own RAM for a device and nothing else. */
		odma_failed(odma_client_of(dev), ODMA_NOT_RAM, phys, size, attrs);
		return DMA_MAPPING_ERROR;
	}
	return odma_map(dev, phys, size, odma_mask(dev), attrs, false);
}

static void unmap_phys(struct device *dev, dma_addr_t bus, size_t size, enum dma_data_direction dir,
		       unsigned long attrs)
{
	odma_unmap(dev, bus, size);
}
#else
static dma_addr_t map_page(struct device *dev, struct page *page, unsigned long offset, size_t size,
			   enum dma_data_direction dir, unsigned long attrs)
{
	return odma_map(dev, page_to_phys(page) + offset, size, odma_mask(dev), attrs, false);
}

static void unmap_page(struct device *dev, dma_addr_t bus, size_t size, enum dma_data_direction dir,
		       unsigned long attrs)
{
	odma_unmap(dev, bus, size);
}

static dma_addr_t map_resource(struct device *dev, phys_addr_t phys, size_t size,
			       enum dma_data_direction dir, unsigned long attrs)
{
	odma_failed(odma_client_of(dev), ODMA_NOT_RAM, phys, size, attrs);
	return DMA_MAPPING_ERROR;
}

static void unmap_resource(struct device *dev, dma_addr_t bus, size_t size,
			   enum dma_data_direction dir, unsigned long attrs)
{
	/* Nothing was ever mapped so. */
	this_cpu_inc(odma_client_of(dev)->counts->unknown);
}
#endif

static void *alloc_coherent(struct device *dev, size_t size, dma_addr_t *bus, gfp_t gfp,
			    unsigned long attrs)
{
	return odma_alloc(dev, size, bus, gfp, attrs);
}

static void free_coherent(struct device *dev, size_t size, void *memory, dma_addr_t bus,
			  unsigned long attrs)
{
	odma_free(dev, size, memory, bus);
}

static struct page *alloc_pages_for(struct device *dev, size_t size, dma_addr_t *bus,
				    enum dma_data_direction dir, gfp_t gfp)
{
	void *memory = odma_alloc(dev, size, bus, gfp, 0);

	return memory ? virt_to_page(memory) : NULL;
}

static void free_pages_of(struct device *dev, size_t size, struct page *page, dma_addr_t bus,
			  enum dma_data_direction dir)
{
	odma_free(dev, size, page_address(page), bus);
}

static int mmap(struct device *dev, struct vm_area_struct *vma, void *memory, dma_addr_t bus,
		size_t size, unsigned long attrs)
{
	unsigned long pages = PAGE_ALIGN(size) >> PAGE_SHIFT;

	/* The device is coherent, so the memory is mapped as it is everywhere else. */
	if (vma->vm_pgoff >= pages || vma_pages(vma) > pages - vma->vm_pgoff)
		return -ENXIO;
	return remap_pfn_range(vma, vma->vm_start, PHYS_PFN(virt_to_phys(memory)) + vma->vm_pgoff,
			       vma->vm_end - vma->vm_start, vma->vm_page_prot);
}

static int get_sgtable(struct device *dev, struct sg_table *table, void *memory, dma_addr_t bus,
		       size_t size, unsigned long attrs)
{
	int error = sg_alloc_table(table, 1, GFP_KERNEL);

	if (!error)
		sg_set_page(table->sgl, virt_to_page(memory), PAGE_ALIGN(size), 0);
	return error;
}

static int dma_supported_by(struct device *dev, u64 mask)
{
	/*
	 * A mask below what the host hands out would fail call by call. One of 32 bits may do all the same: on a Mac that
	 * says more, all addresses seen were below.
	 */
	return mask >= DMA_BIT_MASK(min(odma_client_of(dev)->domain->address_bits, 32u));
}

static u64 get_required_mask(struct device *dev)
{
	return DMA_BIT_MASK(odma_client_of(dev)->domain->address_bits);
}

static size_t max_mapping_size(struct device *dev)
{
	/* A mapping needs one piece of the host's window. One eighth of it can be had while others use the rest. */
	return max_t(u64, odma_client_of(dev)->domain->limit_bytes / 8, PAGE_SIZE) & PAGE_MASK;
}

static size_t opt_mapping_size(void)
{
	/* A mapping costs the same whatever it measures; the kernel takes the maximum where that is less. */
	return SIZE_MAX;
}

static unsigned long get_merge_boundary(struct device *dev)
{
	/* Neighbours are merged where the host put them side by side, which nobody can promise. */
	return 0;
}

/* No sync operations: the devices are coherent (served.c checks), and having none lets the kernel leave the calls out. */
const struct dma_map_ops odma_ops = {
	.alloc = alloc_coherent,
	.free = free_coherent,
#ifdef ODMA_HAVE_ALLOC_PAGES_OP
	.alloc_pages_op = alloc_pages_for,
#else
	.alloc_pages = alloc_pages_for,
#endif
	.free_pages = free_pages_of,
	.mmap = mmap,
	.get_sgtable = get_sgtable,
#ifdef ODMA_HAVE_MAP_PHYS
	.map_phys = map_phys,
	.unmap_phys = unmap_phys,
#else
	.map_page = map_page,
	.unmap_page = unmap_page,
	.map_resource = map_resource,
	.unmap_resource = unmap_resource,
#endif
	.map_sg = odma_map_sg,
	.unmap_sg = odma_unmap_sg,
	.dma_supported = dma_supported_by,
	.get_required_mask = get_required_mask,
	.max_mapping_size = max_mapping_size,
	.opt_mapping_size = opt_mapping_size,
	.get_merge_boundary = get_merge_boundary,
};

/* The operations of a function that cannot be served: its driver is told so where it asks first, and nothing is ever mapped. */

#ifdef ODMA_HAVE_MAP_PHYS
static dma_addr_t map_nothing(struct device *dev, phys_addr_t phys, size_t size, enum dma_data_direction dir,
			      unsigned long attrs)
{
	return DMA_MAPPING_ERROR;
}
#else
static dma_addr_t map_nothing(struct device *dev, struct page *page, unsigned long offset, size_t size,
			      enum dma_data_direction dir, unsigned long attrs)
{
	return DMA_MAPPING_ERROR;
}

static dma_addr_t map_no_resource(struct device *dev, phys_addr_t phys, size_t size, enum dma_data_direction dir,
				  unsigned long attrs)
{
	return DMA_MAPPING_ERROR;
}
#endif

static void unmap_nothing(struct device *dev, dma_addr_t bus, size_t size, enum dma_data_direction dir,
			  unsigned long attrs)
{
}

static int map_no_sg(struct device *dev, struct scatterlist *sg, int nents, enum dma_data_direction dir,
		     unsigned long attrs)
{
	return -EIO;
}

static void unmap_no_sg(struct device *dev, struct scatterlist *sg, int nents, enum dma_data_direction dir,
			unsigned long attrs)
{
}

static void *alloc_nothing(struct device *dev, size_t size, dma_addr_t *bus, gfp_t gfp, unsigned long attrs)
{
	return NULL;
}

static void free_nothing(struct device *dev, size_t size, void *memory, dma_addr_t bus, unsigned long attrs)
{
}

static int no_mask_is_supported(struct device *dev, u64 mask)
{
	return 0;
}

const struct dma_map_ops odma_no_dma = {
	.alloc = alloc_nothing,
	.free = free_nothing,
#ifdef ODMA_HAVE_MAP_PHYS
	.map_phys = map_nothing,
	.unmap_phys = unmap_nothing,
#else
	.map_page = map_nothing,
	.unmap_page = unmap_nothing,
	.map_resource = map_no_resource,
	.unmap_resource = unmap_nothing,
#endif
	.map_sg = map_no_sg,
	.unmap_sg = unmap_no_sg,
	.dma_supported = no_mask_is_supported,
};
