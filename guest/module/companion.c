// SPDX-License-Identifier: GPL-2.0
/* The driver of the DMA device. */
#include "odma.h"

#include <linux/delay.h>
#include <linux/ioport.h>
#include <linux/module.h>
#include <linux/panic_notifier.h>
#include <linux/vmalloc.h>
#include <linux/wait_bit.h>

#include "trace.h"

#define QUEUE(queue, reg) (ODMA_QUEUE_FIRST + (queue) * ODMA_QUEUE_STRIDE + (reg))
#define QUEUE_BYTES (ODMA_MAX_BATCH * ODMA_ENTRY_BYTES)
/* How long idle windows are given back at a time, and how long that is waited for by who needs its end. */
#define TRIM_TIME (2 * HZ)
#define TRIM_WAIT (10 * HZ)

DEFINE_MUTEX(odma_mutex);
LIST_HEAD(odma_domains);

/* What the core calls. */

void odma_ring(struct odma_domain *domain, u32 queue, u32 count)
{
	trace_odma_ring(&domain->pdev->dev, count);
	/* writel orders the entries before the doorbell. The store traps: behind it the answers are there. */
	writel(count, domain->regs + QUEUE(queue, ODMA_QUEUE_DOORBELL));
	mb();
}

static void ring(void *context, u32 queue, u32 count)
{
	odma_ring(context, queue, count);
}

static u32 status(void *context, u32 queue)
{
	struct odma_domain *domain = context;

	return readl(domain->regs + QUEUE(queue, ODMA_QUEUE_STATUS));
}

static void lock(void *context)
{
	struct odma_domain *domain = context;

	raw_spin_lock(&domain->lock);
}

static void unlock(void *context)
{
	struct odma_domain *domain = context;

	raw_spin_unlock(&domain->lock);
}

/* Takes this CPU's queue for a call. Interrupts are off until it is given back. */
u32 odma_queue_take(struct odma_domain *domain, unsigned long *flags)
{
	u32 queue;

	local_irq_save(*flags);
	/* The last is for what nobody waits for. */
	queue = raw_smp_processor_id() % (domain->queue_count - 1);
	raw_spin_lock(&domain->queue_locks[queue]);
	return queue;
}

void odma_queue_give(struct odma_domain *domain, u32 queue, unsigned long flags)
{
	raw_spin_unlock(&domain->queue_locks[queue]);
	local_irq_restore(flags);
}

/* Guest RAM, in at most ODMA_RAM_RANGES pieces. */

struct ram {
	struct odma_range ranges[64];
	unsigned int count;
};

static int add_ram(struct resource *res, void *arg)
{
	struct ram *ram = arg;
	struct odma_range *last = ram->count ? &ram->ranges[ram->count - 1] : NULL;

	if (last && (last->start + last->len == res->start || ram->count == ARRAY_SIZE(ram->ranges))) {
		last->len = res->end + 1 - last->start;
		return 0;
	}
	ram->ranges[ram->count].start = res->start;
	ram->ranges[ram->count].len = resource_size(res);
	ram->count++;
	return 0;
}

/*
 * Holes are memory that firmware keeps. Where there are too many pieces the smallest holes are taken for RAM: nothing in
 * them is ever asked for, and the host refuses what is not RAM.
 */
static void close_holes(struct ram *ram)
{
	while (ram->count > ODMA_RAM_RANGES) {
		struct odma_range *r = ram->ranges;
		unsigned int i, best = 1;
		u64 smallest = U64_MAX;

		for (i = 1; i < ram->count; i++) {
			u64 hole = r[i].start - (r[i - 1].start + r[i - 1].len);

			if (hole < smallest) {
				smallest = hole;
				best = i;
			}
		}
		r[best - 1].len = r[best].start + r[best].len - r[best - 1].start;
		ram->count--;
		memmove(&r[best], &r[best + 1], (ram->count - best) * sizeof(*r));
	}
}

static int find_ram(struct odma_core_config *config)
{
	struct ram *ram = kzalloc(sizeof(*ram), GFP_KERNEL);

	if (!ram)
		return -ENOMEM;
	walk_iomem_res_desc(IORES_DESC_NONE, IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY, 0, U64_MAX, ram,
			    add_ram);
	close_holes(ram);
	memcpy(config->ram, ram->ranges, ram->count * sizeof(ram->ranges[0]));
	config->ram_count = ram->count;
	kfree(ram);
	return config->ram_count ? 0 : -ENODEV;
}

/* Makes the core anew, with nothing mapped. Nobody may be using the old one; whoever gives its windows back is waited for, which is bounded. */
int odma_make_core(struct odma_domain *domain)
{
	struct odma_core_config config = {
		.limit_bytes = domain->limit_bytes,
		.limit_entries = domain->limit_entries,
		.lines = ODMA_MAX_BATCH,
		.queues = domain->queue_count,
		.queue = domain->queues,
		.context = domain,
		.ring = ring,
		.status = status,
		.lock = lock,
		.unlock = unlock,
	};
	int error = find_ram(&config);
	u64 bytes;

	if (error)
		return error;
	if (!wait_var_event_timeout(&domain->trims, !atomic_read(&domain->trims), TRIM_WAIT))
		return -EBUSY;
	bytes = odma_core_bytes(&config);
	if (!bytes) {
		pci_err(domain->pdev, "limits of %llu bytes in %u mappings cannot be used\n", config.limit_bytes,
			config.limit_entries);
		return -EINVAL;
	}
	if (!domain->core_memory || domain->core_bytes < bytes) {
		/* In huge pages where the kernel can: mappings all over RAM touch all of it. */
		u8 *memory = vmalloc_huge(bytes, GFP_KERNEL);

		if (!memory)
			return -ENOMEM;
		vfree(domain->core_memory);
		domain->core_memory = memory;
		domain->core_bytes = bytes;
	}
	/* Cannot fail: it was asked how much memory it needs. */
	domain->core = odma_core_create(&config, domain->core_memory, domain->core_bytes);
	domain->trimming = false;
	return WARN_ON(!domain->core) ? -EINVAL : 0;
}

/* A reset of the served functions loses what the kernel wrote into their configuration. */
static void each_served(struct odma_domain *domain, bool save)
{
	struct pci_dev *pdev = NULL;

	for_each_pci_dev(pdev) {
		if (!odma_serves(domain, pdev))
			continue;
		if (save)
			pci_save_state(pdev);
		else
			pci_restore_state(pdev);
	}
}

void odma_reset(struct odma_domain *domain)
{
	each_served(domain, true);
	writel(ODMA_CONTROL_RESET, domain->regs + ODMA_CONTROL);
	each_served(domain, false);
}

bool odma_running(struct odma_domain *domain)
{
	return readl(domain->regs + ODMA_STATE) == ODMA_STATE_ON;
}

static int check(struct odma_domain *domain)
{
	struct pci_dev *pdev = domain->pdev;
	u32 magic = readl(domain->regs + ODMA_MAGIC), version = readl(domain->regs + ODMA_VERSION);
	u32 granule = readl(domain->regs + ODMA_GRANULE), batch = readl(domain->regs + ODMA_BATCH);
	u32 queues = readl(domain->regs + ODMA_QUEUES), features = readl(domain->regs + ODMA_FEATURES);

	if (magic != ODMA_MAGIC_VALUE || version >> 16 != ODMA_VERSION_VALUE >> 16) {
		pci_err(pdev, "unknown protocol (magic %#x, version %#x); this module speaks %u.x\n", magic, version,
			ODMA_VERSION_VALUE >> 16);
		return -ENODEV;
	}
	if (granule != SZ_16K || batch < ODMA_MAX_BATCH || queues < 2 || !(features & ODMA_FEATURE_LATER)) {
		pci_err(pdev, "granule %u, batch %u, %u queues or features %#x cannot be used\n", granule, batch, queues,
			features);
		return -ENODEV;
	}
	domain->served = readl(domain->regs + ODMA_SERVED);
	domain->address_bits = clamp(readl(domain->regs + ODMA_ADDRESS_BITS), 1u, 64u);
	domain->limit_bytes = readq(domain->regs + ODMA_LIMIT_BYTES);
	domain->limit_entries = readl(domain->regs + ODMA_LIMIT_ENTRIES);
	return 0;
}

/*
 * Starts with nothing mapped, whatever was before: a crashed kernel's mappings, or a device that came back, with limits that may be others. Nobody
 * uses the domain; under odma_mutex once it is listed. -ENXIO: there is no device in the slot.
 */
int odma_start(struct odma_domain *domain)
{
	int error = check(domain);
	u32 queue;

	if (error)
		return error;
	if (domain->dirty || odma_stray_master(domain) || readl(domain->regs + ODMA_STATE) != ODMA_STATE_OFF)
		odma_reset(domain);
	domain->dirty = false;
	error = odma_make_core(domain);
	if (error)
		return error;
	for (queue = 0; queue < domain->queue_count; queue++)
		writeq(virt_to_phys(domain->queues[queue]), domain->regs + QUEUE(queue, ODMA_QUEUE_BASE));
	writel(ODMA_CONTROL_ENABLE, domain->regs + ODMA_CONTROL);
	if (readl(domain->regs + ODMA_STATE) == ODMA_STATE_GONE)
		return -ENXIO;
	if (!odma_running(domain)) {
		pci_err(domain->pdev, "the DMA device does not start (state %u)\n",
			readl(domain->regs + ODMA_STATE));
		return -EIO;
	}
	return 0;
}

/* Takes over what has become of the last batch, if there is one; false if the host still has it at `end`. Under trim_mutex. */
static bool settle_trim(struct odma_domain *domain, u32 queue, unsigned long end)
{
	unsigned long flags;

	if (!domain->trimming)
		return true;
	while (status(domain, queue) == ODMA_STATUS_BUSY) {
		if (time_after(jiffies, end))
			return false;
		usleep_range(200, 1000);
	}
	local_irq_save(flags);
	odma_core_trimmed(domain->core, queue);
	local_irq_restore(flags);
	domain->trimming = false;
	return true;
}

/*
 * Gives idle windows back, while other calls go on: batches for later, in a queue that no CPU uses. Not under odma_mutex, and not for longer than
 * TRIM_TIME: what is left then stays mapped until the next time, and so does a batch that the host has not done. The caller has raised trims.
 */
void odma_trim(struct odma_domain *domain)
{
	u32 queue = domain->queue_count - 1, count;
	unsigned long end = jiffies + TRIM_TIME, flags;
	bool done;

	mutex_lock(&domain->trim_mutex);
	done = settle_trim(domain, queue, end);
	while (done && time_before(jiffies, end)) {
		local_irq_save(flags);
		count = odma_core_trim(domain->core, queue);
		local_irq_restore(flags);
		if (!count)
			break;
		trace_odma_ring(&domain->pdev->dev, count);
		domain->trimming = true;
		writel(count, domain->regs + QUEUE(queue, ODMA_QUEUE_DOORBELL_LATER));
		done = settle_trim(domain, queue, end);
	}
	if (!done)
		pci_warn(domain->pdev, "the host has not given idle windows back in time; the next driver that goes asks again\n");
	mutex_unlock(&domain->trim_mutex);
	/* Nothing of the domain is touched behind this. */
	if (atomic_dec_and_test(&domain->trims))
		wake_up_var(&domain->trims);
}

static void free_domain(struct odma_domain *domain)
{
	u32 queue;

	vfree(domain->core_memory);
	for (queue = 0; queue < domain->queue_count && domain->queues[queue]; queue++)
		free_pages_exact(domain->queues[queue], QUEUE_BYTES);
	if (domain->regs)
		pci_iounmap(domain->pdev, domain->regs);
	odma_record_free(domain);
	kfree(domain);
}

/* One for each CPU, as far as the device has them, and one for odma_trim. */
static int make_queues(struct odma_domain *domain)
{
	u32 queue, most = min_t(u32, nr_cpu_ids + 1, ODMA_MAX_QUEUES);

	domain->queue_count = clamp(readl(domain->regs + ODMA_QUEUES), 2u, most);
	for (queue = 0; queue < domain->queue_count; queue++) {
		raw_spin_lock_init(&domain->queue_locks[queue]);
		domain->queues[queue] = alloc_pages_exact(QUEUE_BYTES, GFP_KERNEL | __GFP_ZERO);
		if (!domain->queues[queue])
			return -ENOMEM;
	}
	return 0;
}

static struct odma_domain *new_domain(struct pci_dev *pdev)
{
	struct odma_domain *domain = kzalloc(sizeof(*domain), GFP_KERNEL);

	if (!domain)
		return NULL;
	domain->pdev = pdev;
	raw_spin_lock_init(&domain->lock);
	INIT_LIST_HEAD(&domain->clients);
	INIT_WORK(&domain->settle, odma_settle);
	mutex_init(&domain->trim_mutex);
	atomic_set(&domain->trims, 0);
	domain->regs = pci_iomap(pdev, 0, ODMA_BAR_BYTES);
	if (!domain->regs || make_queues(domain)) {
		free_domain(domain);
		return NULL;
	}
	return domain;
}

/* The kernel has panicked: the other CPUs are stopped, no lock may be taken. The host is told, in case that nobody reads the console. */
static int panicked(struct notifier_block *nb, unsigned long event, void *message)
{
	struct odma_domain *domain = container_of(nb, struct odma_domain, panic);

	writel(ODMA_CONTROL_PANICKED, domain->regs + ODMA_CONTROL);
	return NOTIFY_DONE;
}

static void hear_panic(struct odma_domain *domain)
{
	domain->hears_panic = readl(domain->regs + ODMA_FEATURES) & ODMA_FEATURE_PANICKED;
	domain->panic.notifier_call = panicked;
	if (domain->hears_panic)
		atomic_notifier_chain_register(&panic_notifier_list, &domain->panic);
}

static void ignore_panic(struct odma_domain *domain)
{
	if (domain->hears_panic)
		atomic_notifier_chain_unregister(&panic_notifier_list, &domain->panic);
}

static int probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct odma_domain *domain;
	int error = pci_enable_device_mem(pdev);

	if (error)
		return error;
	error = pci_request_region(pdev, 0, KBUILD_MODNAME);
	if (error)
		goto disable;
	/* It reads and writes the queue in guest RAM. */
	pci_set_master(pdev);
	error = -ENOMEM;
	domain = new_domain(pdev);
	if (!domain)
		goto release;
	error = check(domain);
	if (!error)
		error = odma_begin(domain);
	if (error)
		goto free;
	pci_set_drvdata(pdev, domain);
	hear_panic(domain);
	odma_debugfs_add(domain);
	pci_info(pdev, "maps up to %llu MiB in %u pieces for what is behind root port %02x.%x\n",
		 domain->limit_bytes >> 20, domain->limit_entries, PCI_SLOT(domain->served),
		 PCI_FUNC(domain->served));
	return 0;
free:
	free_domain(domain);
release:
	pci_release_region(pdev, 0);
disable:
	pci_disable_device(pdev);
	return error;
}

static void remove(struct pci_dev *pdev)
{
	struct odma_domain *domain = pci_get_drvdata(pdev);

	ignore_panic(domain);
	/* Unbinds what still uses it: nothing may be mapped when the device goes. */
	odma_abandon(domain);
	cancel_work_sync(&domain->settle);
	wait_var_event(&domain->trims, !atomic_read(&domain->trims));
	odma_debugfs_remove(domain);
	free_domain(domain);
	pci_release_region(pdev, 0);
	pci_disable_device(pdev);
}

/* Before a reboot or kexec. The next kernel's memory must not be written by what this one's drivers left running. */
static void shutdown(struct pci_dev *pdev)
{
	struct odma_domain *domain = pci_get_drvdata(pdev);

	writel(ODMA_CONTROL_RESET, domain->regs + ODMA_CONTROL);
}

static const struct pci_device_id ids[] = {
	{ PCI_DEVICE(ODMA_PCI_VENDOR, ODMA_PCI_DEVICE) },
	{ }
};
MODULE_DEVICE_TABLE(pci, ids);

static struct pci_driver driver = {
	.name = KBUILD_MODNAME,
	.id_table = ids,
	.probe = probe,
	.remove = remove,
	.shutdown = shutdown,
	.driver.pm = &odma_pm,
	/* Unbinding it by hand would take the mappings of running drivers away. */
	.driver.suppress_bind_attrs = true,
};

int odma_companion_init(void)
{
	return pci_register_driver(&driver);
}

void odma_companion_exit(void)
{
	pci_unregister_driver(&driver);
}
