// SPDX-License-Identifier: GPL-2.0
/* The functions that a DMA device serves: their DMA operations come with each driver that binds, and go with it. */
#include "odma.h"

#include <linux/module.h>
#include <linux/slab.h>

/* How long after a failed probe the kernel has certainly freed what the driver had. */
#define TIDY_DELAY (2 * HZ)

static struct pci_dev *root_port(struct pci_dev *pdev)
{
	struct pci_dev *bridge = pci_upstream_bridge(pdev), *above;

	while (bridge && (above = pci_upstream_bridge(bridge)))
		bridge = above;
	return bridge;
}

/* The DMA device names a port of bus 0, which no kernel renumbers. */
bool odma_serves(struct odma_domain *domain, struct pci_dev *pdev)
{
	struct pci_dev *port = root_port(pdev);

	return port && port->bus->number == 0 && port->devfn == domain->served &&
	       pci_domain_nr(port->bus) == pci_domain_nr(domain->pdev->bus) &&
	       pdev->hdr_type == PCI_HEADER_TYPE_NORMAL;
}

void odma_sum(struct odma_client *client, struct odma_counts *sum)
{
	int cpu;

	memset(sum, 0, sizeof(*sum));
	for_each_possible_cpu(cpu) {
		const struct odma_counts *one = per_cpu_ptr(client->counts, cpu);

		sum->live += READ_ONCE(one->live);
		sum->hits += READ_ONCE(one->hits);
		sum->misses += READ_ONCE(one->misses);
		sum->waits += READ_ONCE(one->waits);
		sum->failed += READ_ONCE(one->failed);
		sum->refused += READ_ONCE(one->refused);
		sum->masked += READ_ONCE(one->masked);
		sum->unknown += READ_ONCE(one->unknown);
	}
}

static struct odma_client *find(struct device *dev)
{
	struct odma_domain *domain;
	struct odma_client *client;

	list_for_each_entry(domain, &odma_domains, list)
		list_for_each_entry(client, &domain->clients, list)
			if (client->dev == dev)
				return client;
	return NULL;
}

static struct odma_domain *domain_of(struct pci_dev *pdev)
{
	struct odma_domain *domain;

	list_for_each_entry(domain, &odma_domains, list)
		if (!domain->closing && odma_serves(domain, pdev))
			return domain;
	return NULL;
}

static bool any_bound(struct odma_domain *domain)
{
	struct odma_client *client;

	list_for_each_entry(client, &domain->clients, list)
		if (client->bound)
			return true;
	return false;
}

static struct odma_client *new_client(struct odma_domain *domain, struct device *dev)
{
	struct odma_client *client = kzalloc(sizeof(*client), GFP_KERNEL);

	if (!client)
		return NULL;
	client->counts = alloc_percpu(struct odma_counts);
	if (!client->counts) {
		kfree(client);
		return NULL;
	}
	client->ops = odma_ops;
	client->domain = domain;
	client->dev = get_device(dev);
	list_add_tail(&client->list, &domain->clients);
	return client;
}

static void free_client(struct odma_client *client)
{
	list_del(&client->list);
	put_device(client->dev);
	free_percpu(client->counts);
	kfree(client);
}

/* Why the function cannot be served, or NULL. */
static const char *obstacle(struct device *dev)
{
	if (!dev_is_dma_coherent(dev))
		return "it is not cache coherent; the host bridge should say dma-coherent";
	if (device_iommu_mapped(dev))
		return "it is behind a virtual IOMMU, which takes its DMA away from this module";
	return NULL;
}

/* Has the DMA device run for a driver of `dev`. */
static bool start(struct odma_domain *domain, struct device *dev)
{
	struct odma_client *other;

	if (any_bound(domain) || odma_running(domain))
		return true;
	list_for_each_entry(other, &domain->clients, list)
		if (other->foreign) {
			dev_err(dev, "DMA is not set up, the driver will fail: %s has a driver from before "
				KBUILD_MODNAME " came. Unbind that first\n", dev_name(other->dev));
			return false;
		}
	/* The function was away and has come back, or the host was reset: what was mapped is gone. */
	if (odma_start(domain)) {
		dev_err(dev, "DMA is not set up, the driver will fail: its DMA device does not start\n");
		return false;
	}
	return true;
}

/* A driver is about to bind: DMA is set up, its probe has not begun. */
static void bind(struct device *dev)
{
	struct odma_domain *domain = domain_of(to_pci_dev(dev));
	struct odma_client *client = find(dev);
	const char *why;

	if (!domain)
		return;
	/* The one from before has gone. */
	if (client)
		client->foreign = false;
	why = obstacle(dev);
	if (why) {
		dev_err(dev, "DMA is not set up, the driver will fail: %s\n", why);
		return;
	}
	if (!start(domain, dev))
		return;
	if (!client)
		client = new_client(domain, dev);
	/* The module stays while operations of its own may be called. */
	if (!client || (!client->bound && !try_module_get(THIS_MODULE))) {
		dev_err(dev, "DMA is not set up, the driver will fail: %s\n",
			client ? KBUILD_MODNAME " is being unloaded" : "out of memory");
		return;
	}
	client->bound = true;
	if (dev->dma_ops != &client->ops)
		client->former = dev->dma_ops;
	set_dma_ops(dev, &client->ops);
}

/* Mappings that the driver left. They stay: the device may still use them. */
static void count_leaks(struct odma_client *client)
{
	struct odma_counts sum;

	odma_sum(client, &sum);
	if (sum.live > client->leaked) {
		dev_warn(client->dev, "the driver left %lld DMA mappings behind\n", sum.live - client->leaked);
		client->domain->leaks += sum.live - client->leaked;
	}
	client->leaked = sum.live;
}

static void release(struct odma_client *client)
{
	client->foreign = false;
	if (client->bound)
		module_put(THIS_MODULE);
	client->bound = false;
}

/* The driver is gone and so is all that the kernel freed for it. */
static void unbound(struct odma_client *client)
{
	/* Linux 6.1 has already taken the operations away. */
	if (client->dev->dma_ops == &client->ops)
		set_dma_ops(client->dev, client->former);
	count_leaks(client);
	odma_trim(client->domain);
	release(client);
}

/* Some time after a failed probe: by then the kernel has freed what it frees for the driver. */
void odma_tidy(struct work_struct *work)
{
	struct odma_domain *domain = container_of(work, struct odma_domain, tidy.work);
	struct odma_client *client;

	mutex_lock(&odma_mutex);
	list_for_each_entry(client, &domain->clients, list)
		if (!client->bound)
			count_leaks(client);
	odma_trim(domain);
	mutex_unlock(&odma_mutex);
}

static int notified(struct notifier_block *block, unsigned long action, void *data)
{
	struct device *dev = data;
	struct odma_client *client;

	mutex_lock(&odma_mutex);
	client = find(dev);
	switch (action) {
	case BUS_NOTIFY_BIND_DRIVER:
		bind(dev);
		break;
	case BUS_NOTIFY_UNBOUND_DRIVER:
		if (client)
			unbound(client);
		break;
	case BUS_NOTIFY_DRIVER_NOT_BOUND:
		/* The kernel has yet to free what it frees for the driver, through our operations: they stay. */
		if (client) {
			release(client);
			schedule_delayed_work(&client->domain->tidy, TIDY_DELAY);
		}
		break;
	case BUS_NOTIFY_REMOVED_DEVICE:
		if (client) {
			count_leaks(client);
			free_client(client);
		}
		break;
	}
	mutex_unlock(&odma_mutex);
	return NOTIFY_OK;
}

static struct notifier_block notifier = { .notifier_call = notified };

/*
 * Looks for functions that had a driver before this module came: its DMA does not go through here and never will, and the addresses that it
 * gave its device mean nothing to the host. While one has such a driver the host lets none of them do DMA. Whether there is one; under odma_mutex.
 */
bool odma_adopt(struct odma_domain *domain)
{
	struct pci_dev *pdev = NULL;

	for_each_pci_dev(pdev) {
		struct odma_client *client;

		if (!odma_serves(domain, pdev) || !pdev->dev.driver)
			continue;
		domain->dirty = true;
		client = new_client(domain, &pdev->dev);
		if (client)
			client->foreign = true;
		pci_err(pdev, "not served, cannot do DMA: the driver %s was bound before " KBUILD_MODNAME
			" came. Unbind and bind it, or load " KBUILD_MODNAME " earlier\n", pdev->dev.driver->name);
	}
	return domain->dirty;
}

/* Forgets what odma_adopt() found; under odma_mutex. */
void odma_disown(struct odma_domain *domain)
{
	struct odma_client *client, *next;

	list_for_each_entry_safe(client, next, &domain->clients, list)
		free_client(client);
}

/* Unbinds the drivers of all served functions and takes the operations away. */
void odma_abandon(struct odma_domain *domain)
{
	struct odma_client *client, *next;

	mutex_lock(&odma_mutex);
	domain->closing = true;
	mutex_unlock(&odma_mutex);
	for (;;) {
		struct device *dev = NULL;

		mutex_lock(&odma_mutex);
		list_for_each_entry(client, &domain->clients, list)
			if (client->bound)
				dev = get_device(client->dev);
		mutex_unlock(&odma_mutex);
		if (!dev)
			break;
		dev_warn(dev, "unbinding the driver: its DMA device goes\n");
		device_release_driver(dev);
		put_device(dev);
	}
	list_for_each_entry_safe(client, next, &domain->clients, list) {
		device_lock(client->dev);
		mutex_lock(&odma_mutex);
		if (client->dev->dma_ops == &client->ops)
			set_dma_ops(client->dev, client->former);
		count_leaks(client);
		mutex_unlock(&odma_mutex);
		device_unlock(client->dev);
		mutex_lock(&odma_mutex);
		free_client(client);
		mutex_unlock(&odma_mutex);
	}
}

int odma_served_init(void)
{
	return bus_register_notifier(&pci_bus_type, &notifier);
}

void odma_served_exit(void)
{
	bus_unregister_notifier(&pci_bus_type, &notifier);
}
