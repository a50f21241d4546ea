// SPDX-License-Identifier: GPL-2.0
/* The functions that a DMA device serves: their DMA operations come with each driver that binds, and go with it. */
#include "odma.h"

#include <linux/module.h>
#include <linux/slab.h>

#include "quirks/quirks.h"

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
	if (!client->counts)
		return;
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
		sum->misused += READ_ONCE(one->misused);
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

bool odma_has_master(struct pci_dev *pdev)
{
	u16 command;

	return !pci_read_config_word(pdev, PCI_COMMAND, &command) && (command & PCI_COMMAND_MASTER);
}

/* One that was there before stays. There always is one: what a function is in must not be forgotten for want of memory. Under odma_mutex. */
struct odma_client *odma_client_for(struct odma_domain *domain, struct device *dev)
{
	struct odma_client *client = find(dev);

	if (!client) {
		client = kzalloc(sizeof(*client), GFP_KERNEL | __GFP_NOFAIL);
		client->ops = odma_ops;
		client->domain = domain;
		client->dev = get_device(dev);
		list_add_tail(&client->list, &domain->clients);
		/* The DMA device sleeps behind the function, wakes before it, and is shut down after it. */
		if (!device_link_add(dev, &domain->pdev->dev, DL_FLAG_STATELESS))
			dev_warn(dev, "may be suspended after its DMA device\n");
	}
	if (!client->counts)
		client->counts = alloc_percpu(struct odma_counts);
	return client;
}

static void free_client(struct odma_client *client)
{
	odma_forget_memory(client);
	list_del(&client->list);
	device_link_remove(client->dev, &client->domain->pdev->dev);
	put_device(client->dev);
	free_percpu(client->counts);
	kfree(client);
}

/* Whether a function without a driver that is served may start DMA once it is let. */
bool odma_stray_master(struct odma_domain *domain)
{
	struct pci_dev *pdev = NULL;
	bool stray = false;

	for_each_pci_dev(pdev) {
		struct odma_client *client = odma_serves(domain, pdev) ? find(&pdev->dev) : NULL;

		if (odma_serves(domain, pdev) && !(client && client->state == ODMA_BOUND))
			stray |= odma_has_master(pdev);
	}
	return stray;
}

/* No DMA from here on. The driver is through with the function; drivers often leave it on. */
static void quiet(struct device *dev)
{
	struct pci_dev *pdev = to_pci_dev(dev);

	/* Pulled: nothing of it can write. */
	if (!pci_device_is_present(pdev))
		return;
	pci_clear_master(pdev);
	/* Writes under way are ahead of the answer to this; reads are waited for. */
	odma_has_master(pdev);
	if (pci_is_pcie(pdev))
		pci_wait_for_pending_transaction(pdev);
}

/* Mappings that the driver left. They stay: nobody knows what they are. */
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

static void set_operations(struct odma_client *client, const struct dma_map_ops *ops)
{
	struct device *dev = client->dev;

	if (dev->dma_ops != &client->ops && dev->dma_ops != &odma_no_dma)
		client->former = dev->dma_ops;
	client->told = 0;
	set_dma_ops(dev, ops);
}

/*
 * Something happens to a function: core/src/served.rs has the table of what follows. Under odma_mutex. Returns the domain whose idle windows are to
 * be given back behind the mutex, or NULL. The client may be gone afterwards.
 */
struct odma_domain *odma_happen(struct odma_client *client, enum odma_event event)
{
	struct odma_domain *domain = client->domain;
	struct device *dev = client->dev;
	u32 acts;

	lockdep_assert_held(&odma_mutex);
	client->state = odma_core_function_next(client->state, event, &acts);
	/* The module stays while its operations may be called. One that goes unbinds what it does not hold. */
	if ((acts & ODMA_ACT_HOLD_MODULE) && !client->holds)
		client->holds = try_module_get(THIS_MODULE);
	if (acts & ODMA_ACT_QUIET)
		quiet(dev);
	if (acts & ODMA_ACT_SERVE)
		set_operations(client, &client->ops);
	if (acts & ODMA_ACT_REFUSE)
		set_operations(client, &odma_no_dma);
	/* Linux 6.1 has already taken them away. */
	if ((acts & ODMA_ACT_RESTORE) && (dev->dma_ops == &client->ops || dev->dma_ops == &odma_no_dma))
		set_dma_ops(dev, client->former);
	if (acts & ODMA_ACT_LEAKS)
		count_leaks(client);
	if (acts & ODMA_ACT_TRIM)
		atomic_inc(&domain->trims);
	if (acts & ODMA_ACT_SETTLE)
		queue_work(system_long_wq, &domain->settle);
	if ((acts & ODMA_ACT_DROP_MODULE) && client->holds) {
		client->holds = false;
		module_put(THIS_MODULE);
	}
	if (acts & ODMA_ACT_FORGET)
		free_client(client);
	return acts & ODMA_ACT_TRIM ? domain : NULL;
}

/* Why the function cannot be served, or NULL. */
const char *odma_obstacle(struct odma_client *client)
{
	if (!client->counts)
		return "out of memory";
	if (!dev_is_dma_coherent(client->dev))
		return "it is not cache coherent; the host bridge should say dma-coherent";
	if (device_iommu_mapped(client->dev))
		return "it is behind a virtual IOMMU, which takes its DMA away from this module";
	return NULL;
}

/* Has the DMA device run for a driver of the function: NULL, or why not. */
static const char *admit(struct odma_client *client)
{
	struct odma_domain *domain = client->domain;
	u32 foreign = 0, using = 0;
	struct odma_client *other;

	list_for_each_entry(other, &domain->clients, list) {
		if (other == client)
			continue;
		foreign += other->state == ODMA_FOREIGN;
		using += other->state == ODMA_BOUND || other->state == ODMA_LEAVING;
	}
	switch (odma_core_admit(domain->closing, odma_running(domain), foreign, using)) {
	case ODMA_ADMIT_GO:
		return NULL;
	case ODMA_ADMIT_START:
		/* The function was away and has come back, or the host was reset: what was mapped is gone. */
		return odma_start(domain) ? "its DMA device does not start" : NULL;
	case ODMA_ADMIT_CLOSING:
		return "its DMA device goes";
	case ODMA_ADMIT_FOREIGN:
		return "another function of its slot has a driver from before " KBUILD_MODNAME " came. Unbind that first";
	default:
		return "the host was reset under the driver of another function of its slot. Unbind that first";
	}
}

/* A driver is about to bind: DMA is set up, its probe has not begun. */
static void bind(struct device *dev)
{
	struct odma_domain *domain = domain_of(to_pci_dev(dev));
	struct odma_client *client;
	const char *why;

	if (!domain)
		return;
	client = odma_client_for(domain, dev);
	why = odma_obstacle(client);
	if (!why)
		why = admit(client);
	if (why)
		dev_err(dev, "no DMA for its driver, which will fail: %s\n", why);
	odma_happen(client, why ? ODMA_DENIED : ODMA_BIND);
}

/* Behind a failed probe: its lock is to be had once the kernel has freed what it frees for the driver. */
static void settle(struct device *dev)
{
	struct odma_domain *trim = NULL;
	struct odma_client *client;

	device_lock(dev);
	mutex_lock(&odma_mutex);
	client = find(dev);
	if (client && client->state == ODMA_LEAVING)
		trim = odma_happen(client, ODMA_SETTLED);
	mutex_unlock(&odma_mutex);
	device_unlock(dev);
	if (trim)
		odma_trim(trim);
}

/* The first function in one of the states, held; under odma_mutex. */
static struct device *one_that_is(struct odma_domain *domain, unsigned long states, u32 *state)
{
	struct odma_client *client;

	list_for_each_entry(client, &domain->clients, list) {
		if (BIT(client->state) & states) {
			*state = client->state;
			return get_device(client->dev);
		}
	}
	return NULL;
}

void odma_settle(struct work_struct *work)
{
	struct odma_domain *domain = container_of(work, struct odma_domain, settle);
	u32 state;

	for (;;) {
		struct device *dev;

		mutex_lock(&odma_mutex);
		dev = one_that_is(domain, BIT(ODMA_LEAVING), &state);
		mutex_unlock(&odma_mutex);
		if (!dev)
			return;
		settle(dev);
		put_device(dev);
	}
}

static int notified(struct notifier_block *block, unsigned long action, void *data)
{
	struct odma_domain *trim = NULL, *domain;
	struct odma_client *client;
	struct device *dev = data;

	mutex_lock(&odma_mutex);
	client = find(dev);
	switch (action) {
	case BUS_NOTIFY_BIND_DRIVER:
		bind(dev);
		break;
	case BUS_NOTIFY_UNBOUND_DRIVER:
		if (client)
			trim = odma_happen(client, ODMA_UNBOUND);
		break;
	case BUS_NOTIFY_DRIVER_NOT_BOUND:
		/* The kernel has yet to free what it frees for the driver, through our operations: they stay. */
		if (client)
			odma_happen(client, ODMA_PROBE_FAILED);
		break;
	case BUS_NOTIFY_REMOVED_DEVICE:
		if (client)
			odma_happen(client, ODMA_REMOVED);
		break;
	}
	domain = action == BUS_NOTIFY_ADD_DEVICE ? domain_of(to_pci_dev(dev)) : NULL;
	mutex_unlock(&odma_mutex);
	if (trim)
		odma_trim(trim);
	if (domain)
		outboard_quirks_served(to_pci_dev(dev));
	return NOTIFY_OK;
}

static struct notifier_block notifier = { .notifier_call = notified };

/* Unbinds the drivers of all served functions; the domain, from then on, is none. */
void odma_abandon(struct odma_domain *domain)
{
	const unsigned long using = BIT(ODMA_BOUND) | BIT(ODMA_REFUSED) | BIT(ODMA_LEAVING);
	struct odma_client *client, *next;
	struct device *dev;
	u32 state;

	mutex_lock(&odma_mutex);
	domain->closing = true;
	while ((dev = one_that_is(domain, using, &state))) {
		mutex_unlock(&odma_mutex);
		if (state == ODMA_LEAVING) {
			settle(dev);
		} else {
			dev_warn(dev, "unbinding the driver: its DMA device goes\n");
			device_release_driver(dev);
		}
		put_device(dev);
		mutex_lock(&odma_mutex);
	}
	/* In this order, and under the mutex: whoever binds from here on is held back by the host. */
	odma_reset(domain);
	list_del(&domain->list);
	list_for_each_entry_safe(client, next, &domain->clients, list)
		odma_happen(client, ODMA_REMOVED);
	mutex_unlock(&odma_mutex);
}

/* Whether a driver is served anywhere. */
bool odma_any_bound(void)
{
	struct odma_domain *domain;
	struct odma_client *client;
	bool bound = false;

	mutex_lock(&odma_mutex);
	list_for_each_entry(domain, &odma_domains, list) {
		list_for_each_entry(client, &domain->clients, list) {
			if (client->state != ODMA_BOUND)
				continue;
			dev_warn(client->dev, "cannot hibernate: what its driver has mapped cannot be mapped so again. Unbind it first\n");
			bound = true;
		}
	}
	mutex_unlock(&odma_mutex);
	return bound;
}

/* Whether a driver is served there. */
bool odma_domain_uses(struct odma_domain *domain)
{
	struct device *dev;
	u32 state;

	mutex_lock(&odma_mutex);
	dev = one_that_is(domain, BIT(ODMA_BOUND) | BIT(ODMA_LEAVING), &state);
	mutex_unlock(&odma_mutex);
	put_device(dev);
	return dev;
}

/* With nothing mapped, whatever the host has. */
int odma_restart(struct odma_domain *domain)
{
	int error = 0;

	if (odma_domain_uses(domain)) {
		pci_err(domain->pdev, "drivers were served when the machine hibernated: they are without DMA now. Unbind and bind them\n");
		return -EBUSY;
	}
	mutex_lock(&odma_mutex);
	if (!domain->closing && !domain->dirty)
		error = odma_start(domain);
	mutex_unlock(&odma_mutex);
	return error == -ENXIO ? 0 : error;
}

int odma_served_init(void)
{
	return bus_register_notifier(&pci_bus_type, &notifier);
}

void odma_served_exit(void)
{
	bus_unregister_notifier(&pci_bus_type, &notifier);
}
