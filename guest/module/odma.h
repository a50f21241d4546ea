/* SPDX-License-Identifier: GPL-2.0 */
#ifndef ODMA_H
#define ODMA_H

#ifndef ODMA_HAVE_DMA_OPS
#error "This kernel has no DMA operations per device (CONFIG_DMA_OPS up to Linux 6.11, CONFIG_ARCH_HAS_DMA_OPS from 6.12 on; \
Fedora and Arch Linux ARM leave it out with CONFIG_XEN). outboard_dma cannot work on it: use a kernel with CONFIG_XEN=y, such as Debian's or Ubuntu's."
#endif

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/device.h>
#include <linux/dma-map-ops.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/pci.h>
#include <linux/percpu.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/workqueue.h>

#include "abi.h"
#include "core.h"

/* What one CPU saw of one function. Mappings count by entry: a scatterlist of ten is ten. */
struct odma_counts {
	s64 live;	/* made here less taken down here; the sum over CPUs is what is live */
	u64 hits;	/* calls that needed no exit */
	u64 misses;	/* calls that needed the lock */
	u64 waits;	/* times a call waited for bus addresses to return */
	u64 failed;	/* calls that failed for want of room, or because the host refused */
	u64 refused;	/* calls that can never succeed: not RAM, MMIO */
	u64 masked;	/* calls that failed because the bus address was beyond the function's mask */
	u64 unknown;	/* releases of what was not mapped */
	u64 misused;	/* other mistakes of a driver's: another length, a list's merged count */
};

/* What is said in the log once for each driver that is bound. */
enum odma_told {
	ODMA_TOLD_NOT_MAPPED,
	ODMA_TOLD_LENGTH,
	ODMA_TOLD_SHORT_LIST,
	ODMA_TOLD_NO_MEMORY,
};

struct odma_record;

/* The mappings of one slot, and the DMA device through which they are made. */
struct odma_domain {
	struct pci_dev *pdev;
	void __iomem *regs;
	unsigned int served;		/* the root port's device and function number */
	unsigned int address_bits;
	u64 limit_bytes;
	u32 limit_entries;
	const struct odma_core *core;
	u8 *core_memory;
	u64 core_bytes;
	raw_spinlock_t lock;		/* around what the core's calls share, shortly; raw: taken in any context */
	u32 queue_count;
	u8 *queues[ODMA_MAX_QUEUES];	/* their entries */
	raw_spinlock_t queue_locks[ODMA_MAX_QUEUES];	/* for a call's time; CPUs share a queue only where there are too few */
	struct odma_record *record;
	struct dentry *debugfs;
	struct list_head list;		/* of all, under odma_mutex */
	struct list_head clients;	/* under odma_mutex */
	bool closing;			/* serves nothing new; under odma_mutex */
	bool dirty;			/* a driver that was there before may have left its device running; under odma_mutex */
	struct notifier_block panic;	/* on panic_notifier_list while the device is bound, if it wants to hear of one */
	bool hears_panic;
	struct work_struct settle;	/* behind failed probes */
	struct mutex trim_mutex;	/* around the last queue */
	bool trimming;			/* the host has a batch of that queue; under trim_mutex */
	atomic_t trims;			/* threads that trim, or are about to: the core and the domain stay */
	u64 leaks;			/* mappings that drivers left behind */
	atomic64_t apart, padded;	/* memory for both sides that no window brought out right: mapped by itself, made larger */
};

/* One function behind that root port. */
struct odma_client {
	/* What dev->dma_ops points to, so that an operation finds the rest without a search. */
	struct dma_map_ops ops;
	struct odma_domain *domain;
	struct device *dev;
	const struct dma_map_ops *former;
	struct odma_counts __percpu *counts;
	struct list_head list;
	s64 leaked;
	u32 state;			/* enum odma_state; under odma_mutex */
	bool holds;			/* a reference to this module; under odma_mutex */
	unsigned long told;		/* bits of enum odma_told */
};

extern struct mutex odma_mutex;
extern struct list_head odma_domains;

static inline struct odma_client *odma_client_of(struct device *dev)
{
	return container_of(dev->dma_ops, struct odma_client, ops);
}

/* companion.c */
int odma_companion_init(void);
void odma_companion_exit(void);
u32 odma_queue_take(struct odma_domain *domain, unsigned long *flags);
void odma_queue_give(struct odma_domain *domain, u32 queue, unsigned long flags);
void odma_ring(struct odma_domain *domain, u32 queue, u32 count);
void odma_trim(struct odma_domain *domain);
int odma_start(struct odma_domain *domain);
int odma_make_core(struct odma_domain *domain);
void odma_reset(struct odma_domain *domain);
bool odma_running(struct odma_domain *domain);

/* served.c */
int odma_served_init(void);
void odma_served_exit(void);
bool odma_serves(struct odma_domain *domain, struct pci_dev *pdev);
struct odma_client *odma_client_for(struct odma_domain *domain, struct device *dev);
struct odma_domain *odma_happen(struct odma_client *client, enum odma_event event);
const char *odma_obstacle(struct odma_client *client);
bool odma_has_master(struct pci_dev *pdev);
void odma_abandon(struct odma_domain *domain);
void odma_settle(struct work_struct *work);
bool odma_any_bound(void);
bool odma_domain_uses(struct odma_domain *domain);
int odma_restart(struct odma_domain *domain);
bool odma_stray_master(struct odma_domain *domain);
void odma_sum(struct odma_client *client, struct odma_counts *sum);

/* early.c */
int odma_begin(struct odma_domain *domain);

/* ops.c */
extern const struct dma_map_ops odma_ops;
extern const struct dma_map_ops odma_no_dma;
dma_addr_t odma_map(struct device *dev, phys_addr_t phys, size_t size, u64 mask, unsigned long attrs,
		    bool may_sleep);
bool odma_wait(struct odma_client *client, bool may_sleep, unsigned int *waits);
int odma_release(struct odma_client *client, dma_addr_t bus, size_t size);
bool odma_unmap(struct device *dev, dma_addr_t bus, size_t size);
u64 odma_mask(struct device *dev);
bool odma_tell_once(struct odma_client *client, enum odma_told what);
void odma_failed(struct odma_client *client, int failure, phys_addr_t phys, size_t size,
		 unsigned long attrs);

/* apart.c */
struct odma_apart {
	u64 address, len;	/* guest memory */
	u64 handle, bus;	/* the host's */
};
bool odma_map_apart(struct odma_client *client, phys_addr_t phys, size_t size, size_t alignment, bool may_sleep,
		    u64 *handle, u64 *bus);
void odma_unmap_apart(struct odma_client *client, u64 handle);

/* coherent.c */
void odma_forget_memory(struct odma_client *client);
void *odma_alloc(struct device *dev, size_t size, dma_addr_t *bus, gfp_t gfp, unsigned long attrs);
void odma_free(struct device *dev, size_t size, void *memory, dma_addr_t bus);

/* sg.c */
int odma_map_sg(struct device *dev, struct scatterlist *sg, int nents, enum dma_data_direction dir,
		unsigned long attrs);
void odma_unmap_sg(struct device *dev, struct scatterlist *sg, int nents,
		   enum dma_data_direction dir, unsigned long attrs);

/* power.c */
extern const struct dev_pm_ops odma_pm;
int odma_power_init(void);
void odma_power_exit(void);

/* debugfs.c */
void odma_debugfs_init(void);
void odma_debugfs_exit(void);
void odma_debugfs_add(struct odma_domain *domain);
void odma_debugfs_remove(struct odma_domain *domain);

/* record.c */
extern const struct file_operations odma_record_fops;
void odma_record_map(struct odma_domain *domain, u64 bus, u64 phys, u64 len);
void odma_record_map_sg(struct odma_domain *domain, struct scatterlist *sg, int nents);
void odma_record_unmap(struct odma_domain *domain, u64 bus, u64 len, u32 count);
void odma_record_free(struct odma_domain *domain);

static inline bool odma_recording(struct odma_domain *domain)
{
	return unlikely(READ_ONCE(domain->record));
}

#endif
