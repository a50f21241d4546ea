// SPDX-License-Identifier: GPL-2.0
/* Drivers that came before this module: those that have mapped nothing yet are picked up, the others hold their slot back. */
#include "odma.h"

#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/slab.h>

#include "quirks/quirks.h"

/* Functions of a slot whose drivers can be picked up, and their children. */
#define MOST_LOCKED 32

/* Devices whose locks are held: functions of a slot, and their children. */
struct locked {
	struct device *dev[MOST_LOCKED];
	unsigned int count;
};

/*
 * Without waiting: a driver that is being probed may take a minute, and is not one that has mapped nothing. In this order the kernel takes several
 * of these locks elsewhere, too.
 */
static bool lock_device(struct locked *locked, struct device *dev)
{
	if (locked->count == MOST_LOCKED || !device_trylock(dev))
		return false;
	locked->dev[locked->count++] = get_device(dev);
	return true;
}

static void lock_functions(struct odma_domain *domain, struct locked *locked)
{
	struct pci_dev *pdev = NULL;

	for_each_pci_dev(pdev)
		if (odma_serves(domain, pdev))
			lock_device(locked, &pdev->dev);
}

static void unlock_all(struct locked *locked)
{
	while (locked->count) {
		struct device *dev = locked->dev[--locked->count];

		device_unlock(dev);
		put_device(dev);
	}
}

static bool is_locked(struct locked *locked, struct device *dev)
{
	unsigned int i;

	for (i = 0; i < locked->count; i++)
		if (locked->dev[i] == dev)
			return true;
	return false;
}

/* Keeps a driver from coming to the child, if it has none. */
static int has_driver(struct device *child, void *locked)
{
	return !lock_device(locked, child) || child->driver;
}

/*
 * Whether the driver has certainly mapped nothing yet. virtio_pci, which kernels have built in, maps nothing itself: the drivers of its
 * virtio device do. Of others only those that have neither turned bus master on nor told the kernel which addresses they take.
 */
static bool has_mapped_nothing(struct pci_dev *pdev, struct locked *locked)
{
	if (!strcmp(pdev->dev.driver->name, "virtio-pci"))
		return !device_for_each_child(&pdev->dev, locked, has_driver);
	return !odma_has_master(pdev) && pdev->dma_mask == DMA_BIT_MASK(32) &&
	       pdev->dev.coherent_dma_mask == DMA_BIT_MASK(32);
}

/*
 * Finds functions that had a driver before this module came: its DMA does not go through here, and the addresses that it gave its device mean
 * nothing to the host. Under odma_mutex. True if all of them can be served after all.
 */
static bool find_foreign(struct odma_domain *domain, struct locked *locked)
{
	bool all = !odma_running(domain);
	struct pci_dev *pdev = NULL;

	for_each_pci_dev(pdev) {
		struct odma_client *client;

		if (!odma_serves(domain, pdev) || !READ_ONCE(pdev->dev.driver))
			continue;
		client = odma_client_for(domain, &pdev->dev);
		odma_happen(client, ODMA_FOUND);
		all &= is_locked(locked, &pdev->dev) && has_mapped_nothing(pdev, locked) && !odma_obstacle(client);
	}
	return all;
}

static void tell_foreign(struct odma_domain *domain)
{
	struct odma_client *client;

	list_for_each_entry(client, &domain->clients, list) {
		struct device_driver *driver = READ_ONCE(client->dev->driver);

		dev_err(client->dev, "not served, cannot do DMA: the driver %s was bound before " KBUILD_MODNAME
			" came. Unbind and bind it, or load " KBUILD_MODNAME " earlier\n", driver ? driver->name : "?");
	}
}

static void take_foreign(struct odma_domain *domain)
{
	struct odma_client *client;

	list_for_each_entry(client, &domain->clients, list) {
		odma_happen(client, ODMA_TAKEN);
		dev_info(client->dev, "served from now on: its driver %s has mapped nothing yet\n",
			 client->dev->driver->name);
	}
}

static void disown(struct odma_domain *domain)
{
	struct odma_client *client, *next;

	list_for_each_entry_safe(client, next, &domain->clients, list)
		odma_happen(client, ODMA_REMOVED);
}

/*
 * Starts to serve. A driver that binds from here on is served, and one that has mapped nothing yet. Any other that was there before keeps the DMA
 * device off until it has gone, and then the next one starts it. So does the first one in a slot that is empty now (-ENXIO).
 */
int odma_begin(struct odma_domain *domain)
{
	struct locked *locked = kzalloc(sizeof(*locked), GFP_KERNEL);
	struct pci_dev *pdev = NULL;
	int error;

	if (!locked)
		return -ENOMEM;
	lock_functions(domain, locked);
	mutex_lock(&odma_mutex);
	list_add_tail(&domain->list, &odma_domains);
	if (find_foreign(domain, locked)) {
		take_foreign(domain);
		error = odma_start(domain);
	} else if (list_empty(&domain->clients)) {
		error = odma_start(domain);
	} else {
		tell_foreign(domain);
		domain->dirty = true;
		/* A crashed kernel's mappings are no more a foreign driver's than ours. */
		if (odma_running(domain))
			odma_reset(domain);
		error = odma_make_core(domain);
	}
	if (error == -ENXIO)
		error = 0;
	if (error) {
		disown(domain);
		list_del(&domain->list);
	}
	mutex_unlock(&odma_mutex);
	unlock_all(locked);
	kfree(locked);
	for_each_pci_dev(pdev)
		if (!error && odma_serves(domain, pdev))
			outboard_quirks_served(pdev);
	return error;
}

/* For the package's unit: functions that are not served because their driver came first, and that driver. */
static int show_unserved(char *buffer, const struct kernel_param *param)
{
	struct odma_domain *domain;
	struct odma_client *client;
	int length = 0;

	mutex_lock(&odma_mutex);
	list_for_each_entry(domain, &odma_domains, list) {
		list_for_each_entry(client, &domain->clients, list) {
			struct device_driver *driver = READ_ONCE(client->dev->driver);

			if (client->state == ODMA_FOREIGN || client->state == ODMA_REFUSED)
				length += scnprintf(buffer + length, PAGE_SIZE - length, "%s %s\n", dev_name(client->dev),
						    driver ? driver->name : "-");
		}
	}
	mutex_unlock(&odma_mutex);
	return length;
}

static const struct kernel_param_ops unserved_ops = { .get = show_unserved };
module_param_cb(unserved, &unserved_ops, NULL, 0444);
MODULE_PARM_DESC(unserved, "Functions without DMA, with the driver that they have (read only)");
