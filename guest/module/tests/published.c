// SPDX-License-Identifier: GPL-2.0
/*
 * The published scheme, plainly, for comparison: fixed windows of 256 KiB in a hash table, live mappings in one linked list that each unmapping
 * walks, a mutex around it all, one request for each doorbell (dart-and-dma 1.1, 1.4, 1.5). Through the published device, layout A.
 */
#include "published.h"

#include <linux/hashtable.h>
#include <linux/io.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/spinlock.h>

#include "../abi.h"

#define WINDOW SZ_256K

struct command {
	u32 type, count, status, reserved;
	u64 requests, responses;
};

struct map_request {
	u64 address;
	u32 len, flags;
};

struct map_response {
	u64 id, bus;
	u32 len, status;
};

struct unmap_request {
	u64 id, size;
};

struct unmap_response {
	u64 id;
	u32 status, reserved;
};

struct page_of {
	struct command command;
	struct map_request map;
	struct map_response mapped;
	struct unmap_request unmap;
	struct unmap_response unmapped;
};

struct window {
	struct hlist_node node;
	u64 base, size, bus;
	u32 references;
};

struct mapping {
	struct list_head list;
	u64 bus, len;
	struct window *window;
};

static struct pci_dev *pdev;
static void __iomem *regs;
static struct page_of *page;
static DEFINE_HASHTABLE(windows, 12);
static LIST_HEAD(mappings);
static DEFINE_SPINLOCK(list_lock);
static DEFINE_MUTEX(all_lock);
u64 published_exits;

static u32 ring(u32 type, void *request, void *response)
{
	page->command = (struct command){
		.type = type, .count = 1, .requests = virt_to_phys(request), .responses = virt_to_phys(response),
	};
	writel(lower_32_bits(virt_to_phys(&page->command)), regs + ODMA_PUBLISHED_CMD_LO);
	writel(upper_32_bits(virt_to_phys(&page->command)), regs + ODMA_PUBLISHED_CMD_HI);
	writel(1, regs + ODMA_PUBLISHED_DOORBELL);
	mb();
	/* The two halves of the address need not be written each time. */
	published_exits++;
	return READ_ONCE(page->command.status);
}

static struct window *get_window(u64 base, u64 size)
{
	struct window *window;

	hash_for_each_possible(windows, window, node, base) {
		if (window->base == base && window->size == size) {
			window->references++;
			return window;
		}
	}
	window = kzalloc(sizeof(*window), GFP_KERNEL);
	if (!window)
		return NULL;
	page->map = (struct map_request){ .address = base, .len = size };
	if (ring(ODMA_PUBLISHED_MAP, &page->map, &page->mapped) != ODMA_PUBLISHED_OK) {
		kfree(window);
		return NULL;
	}
	window->base = base;
	window->size = size;
	window->bus = READ_ONCE(page->mapped.bus);
	window->references = 1;
	hash_add(windows, &window->node, base);
	return window;
}

static void put_window(struct window *window)
{
	if (--window->references)
		return;
	page->unmap = (struct unmap_request){ .id = window->base, .size = window->size };
	ring(ODMA_PUBLISHED_UNMAP, &page->unmap, &page->unmapped);
	hash_del(&window->node);
	kfree(window);
}

/* The bus address, or DMA_MAPPING_ERROR. */
u64 published_map(u64 phys, u64 len)
{
	u64 base = round_down(phys, WINDOW), size = WINDOW;
	struct mapping *mapping = kzalloc(sizeof(*mapping), GFP_KERNEL);
	unsigned long flags;

	if (!mapping)
		return ~0ull;
	if (phys + len > base + WINDOW) {
		base = round_down(phys, SZ_16K);
		size = round_up(phys + len, SZ_16K) - base;
	}
	mutex_lock(&all_lock);
	mapping->window = get_window(base, size);
	if (!mapping->window) {
		mutex_unlock(&all_lock);
		kfree(mapping);
		return ~0ull;
	}
	mapping->bus = mapping->window->bus + (phys - base);
	mapping->len = len;
	spin_lock_irqsave(&list_lock, flags);
	list_add_tail(&mapping->list, &mappings);
	spin_unlock_irqrestore(&list_lock, flags);
	mutex_unlock(&all_lock);
	return mapping->bus;
}

void published_unmap(u64 bus, u64 len)
{
	struct mapping *mapping, *found = NULL;
	unsigned long flags;

	mutex_lock(&all_lock);
	spin_lock_irqsave(&list_lock, flags);
	list_for_each_entry(mapping, &mappings, list) {
		if (mapping->bus == bus && mapping->len == len) {
			list_del(&mapping->list);
			found = mapping;
			break;
		}
	}
	spin_unlock_irqrestore(&list_lock, flags);
	if (found) {
		put_window(found->window);
		kfree(found);
	}
	mutex_unlock(&all_lock);
}

int published_open(void)
{
	if (regs)
		return 0;
	pdev = pci_get_device(ODMA_PUBLISHED_PCI_VENDOR, ODMA_PUBLISHED_PCI_DEVICE, NULL);
	if (!pdev)
		return -ENODEV;
	if (pci_enable_device_mem(pdev))
		goto put;
	pci_set_master(pdev);
	page = (struct page_of *)get_zeroed_page(GFP_KERNEL);
	regs = pci_iomap(pdev, 0, ODMA_PUBLISHED_BAR_BYTES);
	if (page && regs && readl(regs + ODMA_PUBLISHED_VERSION) == ODMA_PUBLISHED_VERSION_VALUE)
		return 0;
	published_close();
	return -ENODEV;
put:
	pci_dev_put(pdev);
	pdev = NULL;
	return -ENODEV;
}

void published_close(void)
{
	if (regs)
		pci_iounmap(pdev, regs);
	regs = NULL;
	free_page((unsigned long)page);
	page = NULL;
	if (pdev) {
		pci_disable_device(pdev);
		pci_dev_put(pdev);
	}
	pdev = NULL;
}
