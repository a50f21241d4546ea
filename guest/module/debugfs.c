// SPDX-License-Identifier: GPL-2.0
/* What can be seen: /sys/kernel/debug/outboard_dma/ADDRESS/{stats,windows,record}, a folder for each DMA device. */
#include "odma.h"

#include <linux/debugfs.h>
#include <linux/seq_file.h>

static struct dentry *root;

static void show_device(struct seq_file *file, struct odma_client *client)
{
	struct odma_counts sum;

	odma_sum(client, &sum);
	seq_printf(file, "device %s bound %d live %lld hits %llu misses %llu waits %llu failed %llu refused %llu masked %llu unknown %llu misused %llu\n",
		   dev_name(client->dev), client->state == ODMA_BOUND, sum.live, sum.hits, sum.misses, sum.waits, sum.failed,
		   sum.refused, sum.masked, sum.unknown, sum.misused);
}

/* Used share of a limit, in thousandths. */
static u64 share(u64 used, u64 limit)
{
	return limit ? div64_u64(used * 1000, limit) : 0;
}

static int stats_show(struct seq_file *file, void *unused)
{
	struct odma_domain *domain = file->private;
	struct odma_core_stats stats;
	struct odma_client *client;
	unsigned long flags;
	s64 live = 0;
	u64 hits = 0;

	/* Keeps the core: it is made anew under this lock. */
	mutex_lock(&odma_mutex);
	local_irq_save(flags);
	odma_core_stats(domain->core, &stats);
	local_irq_restore(flags);
	list_for_each_entry(client, &domain->clients, list) {
		struct odma_counts sum;

		odma_sum(client, &sum);
		live += sum.live;
		hits += sum.hits;
	}
	seq_printf(file, "limit_bytes %llu\nlimit_entries %u\n", domain->limit_bytes, domain->limit_entries);
	seq_printf(file, "live %lld\nleaks %llu\n", live, domain->leaks);
	seq_printf(file, "mapped_bytes %llu\nmapped_windows %llu\n", stats.mapped_bytes, stats.mapped);
	seq_printf(file, "used_bytes %llu\nused_windows %llu\nslack_bytes %llu\n", stats.used_bytes, stats.used,
		   stats.slack);
	seq_printf(file, "pressure_bytes_per_mille %llu\npressure_entries_per_mille %llu\n",
		   share(stats.used_bytes, domain->limit_bytes), share(stats.used, domain->limit_entries));
	seq_printf(file, "hits %llu\nmisses %llu\nfailures %llu\n", hits, stats.misses, stats.failures);
	seq_printf(file, "maps %llu\nmaps_ahead %llu\nunmaps %llu\n", stats.maps, stats.ahead, stats.unmaps);
	seq_printf(file, "evicted %llu\nreplaced %llu\nlost %llu\n", stats.evicted, stats.replaced, stats.lost);
	seq_printf(file, "exits %llu\nentries_sent %llu\n", stats.rings, stats.entries);
	seq_printf(file, "host_no_space %llu\nhost_returning %llu\nhost_refused %llu\nlast_refusal %lld\n",
		   stats.no_space, stats.returning, stats.refused, (s64)(s32)stats.last_refusal);
	seq_printf(file, "coherent_apart %lld\ncoherent_padded %lld\n", atomic64_read(&domain->apart),
		   atomic64_read(&domain->padded));
	list_for_each_entry(client, &domain->clients, list)
		if (client->counts)
			show_device(file, client);
	mutex_unlock(&odma_mutex);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(stats);

/* One window a line. The file's position is the slot to look at first. */
static void *windows_next(struct seq_file *file, void *v, loff_t *pos)
{
	struct odma_domain *domain = file->private;
	u64 behind = odma_core_next_window(domain->core, *pos + 1, v);

	*pos = behind ? behind - 1 : *pos + 1;
	if (behind)
		return v;
	kfree(v);
	return NULL;
}

static void *windows_start(struct seq_file *file, loff_t *pos)
{
	struct odma_domain *domain = file->private;
	struct odma_window *window = kmalloc(sizeof(*window), GFP_KERNEL);
	u64 behind;

	mutex_lock(&odma_mutex);
	if (!window)
		return ERR_PTR(-ENOMEM);
	if (*pos == 0)
		seq_puts(file, "# start bytes bus mappings bytes_of_mappings\n");
	behind = odma_core_next_window(domain->core, *pos, window);
	if (!behind) {
		kfree(window);
		return NULL;
	}
	*pos = behind - 1;
	return window;
}

static void windows_stop(struct seq_file *file, void *v)
{
	mutex_unlock(&odma_mutex);
	if (!IS_ERR_OR_NULL(v))
		kfree(v);
}

static int windows_show(struct seq_file *file, void *v)
{
	struct odma_window *w = v;

	seq_printf(file, "%llx %llu %llx %llu %llu\n", w->start, w->len, w->bus, w->references, w->live);
	return 0;
}

static const struct seq_operations windows_sops = {
	.start = windows_start,
	.next = windows_next,
	.stop = windows_stop,
	.show = windows_show,
};
DEFINE_SEQ_ATTRIBUTE(windows);

void odma_debugfs_add(struct odma_domain *domain)
{
	domain->debugfs = debugfs_create_dir(pci_name(domain->pdev), root);
	debugfs_create_file("stats", 0400, domain->debugfs, domain, &stats_fops);
	debugfs_create_file("windows", 0400, domain->debugfs, domain, &windows_fops);
	debugfs_create_file("record", 0600, domain->debugfs, domain, &odma_record_fops);
}

void odma_debugfs_remove(struct odma_domain *domain)
{
	debugfs_remove_recursive(domain->debugfs);
}

void odma_debugfs_init(void)
{
	root = debugfs_create_dir(KBUILD_MODNAME, NULL);
}

void odma_debugfs_exit(void)
{
	debugfs_remove_recursive(root);
}
